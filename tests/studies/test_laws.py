"""Scaling laws: coefficients that are known, published fits, and held-out runs."""

import numpy as np
import pytest
import tiny

from lm.studies import laws

SIZES = np.repeat(np.geomspace(1e6, 1e8, 4), 4)
TOKENS = SIZES * np.tile([5, 20, 80, 320], 4)
KNOWN = {
    laws.CHINCHILLA: {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37},
    laws.OVERTRAINING: {"E": 1.7, "a": 150.0, "b": 240.0, "eta": 0.13},
}


def losses(law):
    """Written out once more, from the papers' own formulas."""
    k = KNOWN[law]
    if law is laws.CHINCHILLA:
        return k["E"] + k["A"] / SIZES ** k["alpha"] + k["B"] / TOKENS ** k["beta"]
    compute, ratio = 6 * SIZES * TOKENS, TOKENS / SIZES
    eta = k["eta"]
    return k["E"] + (k["a"] * ratio**eta + k["b"] * ratio**-eta) * compute**-eta


@pytest.mark.parametrize(
    "law", tiny.mostly_slow(laws.LAWS, laws.LAWS[-1:]), ids=["chinchilla", "overtraining"]
)
def test_known_coefficients_are_recovered_and_held_out_runs_predicted(law):
    held = SIZES.max() == SIZES
    found = laws.fit(law, losses(law), SIZES, TOKENS, held_out=held, starts=6)
    assert found.coefficients == pytest.approx(KNOWN[law], rel=1e-3)
    assert found.held_out_error < 1e-5
    # The control: what is fitted is not what is held out.
    wrong = np.where(held, 10.0, losses(law))
    again = laws.fit(law, wrong, SIZES, TOKENS, held_out=held, starts=6)
    assert again.coefficients == pytest.approx(KNOWN[law], rel=1e-3)
    assert again.held_out_error > 0.5


def test_bands_hold_the_truth_and_widen_with_noise():
    law, truth = laws.CHINCHILLA, losses(laws.CHINCHILLA)
    held = SIZES.max() == SIZES
    widths, covered = [], []
    for noise in (0.001, 0.01):
        rng = np.random.default_rng(3)
        noisy = truth * np.exp(rng.normal(0, noise, truth.size))
        found = laws.fit(law, noisy, SIZES, TOKENS, held_out=held, starts=4)
        band = laws.bootstrap(found, noisy, SIZES, TOKENS, held_out=held, repeats=60)
        widths.append((band.high - band.low).mean())
        covered.append(((band.low <= truth) & (truth <= band.high)).mean())
        low, high = band.coefficients["alpha"]
        assert low < found.coefficients["alpha"] < high
    assert widths[1] > 4 * widths[0]
    assert min(covered) > 0.5


# arXiv 2403.08540: losses on RedPajama of four models at 20 tokens a parameter and of the smallest
# one at 320; then two larger ones, which its fit predicts with errors of 0.7103% and 0.7320%.
GADRE_SIZES = np.array(
    [10_569_312, 78_914_048, 153_677_376, 411_616_256, 10_569_312, 1_439_795_200, 6_889_410_560]
)
GADRE_RATIOS = np.array([20, 20, 20, 20, 320, 640, 20])
GADRE_LOSSES = np.array([5.38702, 3.89994, 3.53115, 3.14977, 4.57229, 2.5021, 2.4250])


def test_the_published_fit_of_the_overtraining_law_is_found_again():
    found = laws.fit(
        laws.OVERTRAINING,
        GADRE_LOSSES,
        GADRE_SIZES,
        GADRE_SIZES * GADRE_RATIOS,
        held_out=np.arange(7) >= 5,
        huber=None,
    )
    published = {"E": 1.837, "a": 212.2, "b": 366.7, "eta": 0.1364}
    assert found.coefficients == pytest.approx(published, rel=5e-4)
    np.testing.assert_allclose(found.predicted[5:], [2.5198, 2.4427], atol=1e-4)
    assert found.held_out_error == pytest.approx((0.007103 + 0.007320) / 2, abs=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"parameters": np.geomspace(1e6, 1e8, 16), "tokens": np.full(16, 1e9)},
            "several sizes and of several lengths",
        ),
        ({"held_out": np.arange(16) >= 3}, "3 different runs do not determine the 5"),
        ({"losses": np.full(16, -1.0)}, "positive and finite"),
        ({"parameters": SIZES[:3]}, r"must be \[J\]"),
    ],
)
def test_runs_that_determine_nothing_are_refused(change, message):
    given = {"losses": losses(laws.CHINCHILLA), "parameters": SIZES, "tokens": TOKENS} | change
    with pytest.raises(ValueError, match=message):
        laws.fit(laws.CHINCHILLA, **given)
