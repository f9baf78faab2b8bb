"""The best fraction has its published values, and a fit finds the law that made its data."""

import math

import numpy as np
import pytest

from objectives.quantization import optimal_qat as laws
from objectives.quantization.optimal_qat import fit_qat_law, optimal_qat_fraction, qat_law

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
