"""The laws have their published values, and a fit finds the law that made its data."""

import math

import numpy as np
import pytest

from objectives.quantization import scaling_laws as laws
from objectives.quantization.scaling_laws import (
    chen_qat_law,
    fit_qat_law,
    kumar_effective_parameters,
    kumar_precision_law,
    optimal_qat_fraction,
    qat_law,
)

# Made up, of the order of what one sees; the paper's own coefficients are unknown.
LAW = laws.QATLaw(
    alpha=1.6,
    beta=400.0,
    gamma=0.3,
    zeta=300.0,
    eta=0.33,
    theta=0.6,
    kappa=1.1,
    phi=30.0,
    chi=0.8,
    psi=0.2,
    omega=0.4,
    lambda_=20.0,
    mu=0.7,
    nu=0.15,
    xi=0.5,
    rho=0.3,
)


@pytest.mark.parametrize(
    ("ratio", "fraction"),
    [
        (5, 0.0153),
        (10, 0.0538),
        (20, 0.1058),
        (40, 0.1613),
        (100, 0.2319),
        (200, 0.2808),
        (1000, 0.3775),
        (1e4, 0.4816),
        (1e5, 0.5574),
        (1, 0.0),
        (0.3, 0.0),
    ],
)
def test_fraction_by_tokens_per_parameter_byte(ratio, fraction):
    assert optimal_qat_fraction(ratio * 1e6, 1e6, 8) == pytest.approx(fraction, abs=6e-5)


@pytest.mark.parametrize(
    ("parameters", "tokens", "fractions"),
    [
        (86e6, 2.3e9, (0.2853, 0.2369, 0.1843, 0.1521)),
        (86e6, 1.4e12, (0.5647, 0.5449, 0.5233, 0.5097)),
        (125e6, 2.5e9, (0.2655, 0.2153, 0.1613, 0.1288)),
        (7e9, 7e11, (0.3654, 0.3252, 0.2808, 0.2527)),
    ],
)
def test_fraction_by_width(parameters, tokens, fractions):
    for bits, fraction in zip((1, 2, 4, 6), fractions, strict=True):
        assert optimal_qat_fraction(tokens, parameters, bits) == pytest.approx(fraction, abs=6e-5)


def test_fraction_is_monotone_and_its_derivative_known():
    ratios = np.exp(np.linspace(0.5, 12, 50))
    fractions = np.array([optimal_qat_fraction(s, 1, 8) for s in ratios])
    assert (np.diff(fractions) > 0).all()
    a, step = laws.FRACTION_COEFFICIENT, 1e-5
    for s, f in zip(ratios, fractions, strict=True):
        up, down = (optimal_qat_fraction(s * math.exp(d), 1, 8) for d in (step, -step))
        assert (up - down) / (2 * step) == pytest.approx(a * f / math.log(s) ** 2, rel=1e-4)
    assert optimal_qat_fraction(18.59, 1, 8) == pytest.approx(0.1, abs=1e-4)
    assert optimal_qat_fraction(16464, 1, 8) == pytest.approx(0.5, abs=1e-4)
    for bad in ((0, 1, 8), (1, -1, 8), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            optimal_qat_fraction(*bad)


def test_law_term_by_term():
    n, qat, fp, bits = 1e8, 1e9, 4e9, 4
    s_qat, s_fp = qat / (n * bits / 8), fp / (n * bits / 8)
    expected = {
        "alpha": 1.6,
        "beta": 400 * 5e9**-0.3,
        "zeta": 300 * n**-0.33,
        "theta": 0.6 * 2 ** (-1.1 * 4),
        "phi": 30 * 2 ** (-0.8 * 4) / (n**0.2 * s_qat**0.4),
        "lambda_": 20 * 2 ** (-0.7 * 4) / (n**0.15 * s_fp**0.5 * s_qat**0.3),
    }
    assert laws.qat_law_terms(LAW, n, qat, fp, bits) == pytest.approx(expected)
    assert qat_law(LAW, n, qat, fp, bits) == pytest.approx(sum(expected.values()))
    with pytest.raises(ValueError, match="positive"):
        qat_law(LAW, n, 0, fp, bits)


def test_best_fraction_is_the_grid_minimum():
    tokens, n, bits = 5e9, 1e8, 2
    grid = np.linspace(0.001, 0.999, 4991)
    best = grid[np.argmin(qat_law(LAW, n, grid * tokens, (1 - grid) * tokens, bits))]
    assert laws.best_fraction(LAW, tokens, n, bits) == pytest.approx(best, abs=3e-4)
    # It rises with the tokens where omega < xi + rho, and falls where not.
    steep = LAW._replace(omega=1.5)
    for law, sign in ((LAW, 1), (steep, -1)):
        more, fewer = (laws.best_fraction(law, d, n, bits) for d in (1e11, 1e9))
        assert sign * (more - fewer) > 0


def test_uses_of_the_law():
    tokens, n, bits = 5e9, 1e8, 2
    best = laws.best_fraction(LAW, tokens, n, bits)
    assert laws.wasted_tokens(LAW, tokens, n, bits, best) == pytest.approx(0, abs=1e-3 * tokens)
    wasted = laws.wasted_tokens(LAW, tokens, n, bits, 0.02)
    assert 0 < wasted < tokens
    loss = qat_law(LAW, n, 0.02 * tokens, 0.98 * tokens, bits)
    assert laws.best_loss(LAW, tokens - wasted, n, bits) == pytest.approx(loss, rel=1e-6)
    widths = (1, 2, 4, 8)
    chosen = laws.best_bits(LAW, tokens, 5e7, widths)
    losses = [laws.best_loss(LAW, tokens, 8 * 5e7 / b, b) for b in widths]
    assert chosen == widths[int(np.argmin(losses))]


def runs():
    """A grid of runs, [J] each."""
    sizes, ratios = (2e7, 6e7, 2e8, 6e8), (10, 40, 160, 640)
    grid = np.meshgrid(sizes, ratios, (1, 2, 4, 6), (0.03, 0.1, 0.3, 0.6, 0.9))
    n, ratio, bits, fraction = (a.ravel() for a in grid)
    return n, fraction * ratio * n, (1 - fraction) * ratio * n, bits


def test_fit_recovers_the_law():
    n, qat, fp, bits = runs()
    losses = qat_law(LAW, n, qat, fp, bits)
    fit = fit_qat_law(losses, n, qat, fp, bits, held_out=n == n.max(), starts=6)
    assert fit.error < 1e-4
    assert fit.held_out_error < 1e-3
    for got, want in zip(fit.law, LAW, strict=True):
        assert got == pytest.approx(want, rel=0.05)
    for tokens in (1e9, 1e11):
        expected = laws.best_fraction(LAW, tokens, 1e8, 2)
        assert laws.best_fraction(fit.law, tokens, 1e8, 2) == pytest.approx(expected, abs=0.01)


def test_fit_bears_outliers():
    n, qat, fp, bits = runs()
    rng = np.random.default_rng(0)
    losses = qat_law(LAW, n, qat, fp, bits) * np.exp(0.002 * rng.standard_normal(n.size))
    losses[::40] += 1.0
    fit = fit_qat_law(losses, n, qat, fp, bits, starts=3)
    assert np.abs(qat_law(fit.law, n, qat, fp, bits) - qat_law(LAW, n, qat, fp, bits)).max() < 0.05
    assert math.isnan(fit.held_out_error)


def test_fit_refuses():
    n, qat, fp, bits = (a[:10] for a in runs())
    with pytest.raises(ValueError, match="10 runs do not determine 16 coefficients"):
        fit_qat_law(np.ones(10), n, qat, fp, bits)
    with pytest.raises(ValueError, match="must be \\[J\\]"):
        fit_qat_law(np.ones(9), n, qat, fp, bits)
    with pytest.raises(ValueError, match="losses must be positive"):
        fit_qat_law(np.zeros(10), n, qat, fp, bits)


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
