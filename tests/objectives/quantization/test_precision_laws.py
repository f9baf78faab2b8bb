"""The laws of other papers have their published values."""

import math

import numpy as np
import pytest

from objectives.quantization import precision_laws as laws
from objectives.quantization.precision_laws import (
    chen_qat_law,
    kumar_effective_parameters,
    kumar_precision_law,
)


def test_chen():
    where = {"tokens": 50e9, "parameters": 297e6, "group_size": 128}
    values = {"W4A4": 0.06332, "W4A16": 0.02410, "W16A4": 0.04430}
    for setting, value in values.items():
        assert chen_qat_law(**where, setting=setting) == pytest.approx(value, abs=6e-6)
    more = chen_qat_law(500e9, 297e6, 128, "W4A4")
    assert more / values["W4A4"] == pytest.approx(1.1871, abs=2e-4)
    shrink = chen_qat_law(1e11, 595e6, 128, "W4A4") / chen_qat_law(1e11, 74e6, 128, "W4A4")
    assert shrink == pytest.approx(0.634, abs=1e-3)
    ratio = chen_qat_law(145e9, 145e6, 32, "W16A4") / chen_qat_law(145e9, 145e6, 32, "W4A16")
    assert ratio == pytest.approx(1.144, abs=1e-3)
    assert chen_qat_law(1e9, 1e8, 1, "W4A4") == 0
    with pytest.raises(ValueError, match="setting must be"):
        chen_qat_law(1e9, 1e8, 32, "W2A16")
    with pytest.raises(ValueError, match="group_size"):
        chen_qat_law(1e9, 1e8, 0, "W4A4")


def test_kumar():
    shares = {2: 0.5266, 3: 0.6743, 4: 0.7759, 8: 0.9498, 16: 0.9975}
    for bits, share in shares.items():
        assert kumar_effective_parameters(1.0, bits) == pytest.approx(share, abs=6e-5)
    confirmed = kumar_precision_law(1e9, 1e8)
    assert confirmed == {"parameters": pytest.approx(0.4585, abs=6e-5)}
    assert kumar_precision_law(1e9, 1e8, 4)["parameters"] == pytest.approx(0.5201, abs=6e-5)
    with pytest.raises(ValueError, match="activation_gamma: not confirmed"):
        kumar_precision_law(1e9, 1e8, activation_bits=8)
    with pytest.raises(ValueError, match="post_factor, post_gamma: not confirmed"):
        kumar_precision_law(1e9, 1e8, post_bits=4)

    everything = {"post_bits": 4, "law": laws.KUMAR_UNCONFIRMED}
    once, twice = (kumar_precision_law(d, 1e8, **everything) for d in (1e9, 2e9))
    assert set(once) == {"parameters", "tokens", "irreducible", "post_training"}
    assert twice["post_training"] / once["post_training"] == pytest.approx(1.421, abs=1e-3)


def test_kumar_best_precision_is_independent_of_compute():
    """One gamma for all three tensors and compute C = 6/16 N D P: P* = 1.9038 gamma."""
    gamma, widths = 2.6745, np.linspace(2, 12, 2001)
    law = laws.KUMAR_UNCONFIRMED._replace(cache_gamma=gamma, activation_gamma=gamma)
    for compute in (1e18, 1e21):
        best = []
        for p in widths:  # the best N of each P is known where alpha = beta
            share = kumar_effective_parameters(1.0, p, p, p, law)
            product = compute * 16 / (6 * p)
            n = (law.parameters_factor / law.tokens_factor) ** (1 / law.exponent) * product
            n = math.sqrt(n / share)
            terms = kumar_precision_law(product / n, n, p, p, p, law=law)
            best.append(sum(terms.values()))
        assert widths[int(np.argmin(best))] == pytest.approx(1.9038 * gamma, abs=0.01)
