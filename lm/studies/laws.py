"""Laws of the loss at the end of training, fitted to one's own runs and tried on held-out ones.

N parameters, D tokens, C = 6 N D model FLOPs, M = D / N tokens a parameter; losses in nats per
token. Pure NumPy and scipy in float64. The law of quantization-aware training is
`objectives.quantization.fit_qat_law`.

    J  runs        P  coefficients
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.studies.outcomes import Row


class Law(NamedTuple):
    """The form of a law.

    Attributes:
      name: as it is shown, with the formula.
      coefficients: names of the P coefficients, all positive.
      log_terms: (logs of the coefficients [P], log N [J], log D [J]) -> logs of the terms [K, J],
        whose sum is the loss.
      exponents: those of the coefficients that are exponents; the others, which come first, are
        the factors of the terms.
    """

    name: str
    coefficients: tuple[str, ...]
    log_terms: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    exponents: tuple[str, ...]


def _chinchilla(logs_P, log_n_J, log_d_J):
    e, a, b, alpha, beta = logs_P
    return np.stack(
        [
            np.full_like(log_n_J, e),
            a - np.exp(alpha) * log_n_J,
            b - np.exp(beta) * log_d_J,
        ]
    )


def _overtraining(logs_P, log_n_J, log_d_J):
    e, a, b, log_eta = logs_P
    eta = np.exp(log_eta)
    log_c_J, log_m_J = math.log(6) + log_n_J + log_d_J, log_d_J - log_n_J
    return np.stack(
        [
            np.full_like(log_n_J, e),
            a + eta * (log_m_J - log_c_J),
            b - eta * (log_m_J + log_c_J),
        ]
    )


# L(N, D) = E + A N^-alpha + B D^-beta (arXiv 2203.15556, section 3.3, approach 3).
CHINCHILLA = Law(
    "Chinchilla: E + A N^-alpha + B D^-beta",
    ("E", "A", "B", "alpha", "beta"),
    _chinchilla,
    ("alpha", "beta"),
)

# L(C, M) = E + (a M^eta + b M^-eta) C^-eta (arXiv 2403.08540, equation 4).
OVERTRAINING = Law(
    "over-training: E + (a M^eta + b M^-eta) C^-eta",
    ("E", "a", "b", "eta"),
    _overtraining,
    ("eta",),
)

LAWS = (CHINCHILLA, OVERTRAINING)


class Fit(NamedTuple):
    """A fitted law.

    Attributes:
      law: its form.
      coefficients: name -> value.
      predicted: [J] losses of all runs, the held-out ones included.
      error: mean relative error on the runs that it was fitted to.
      held_out_error: on the others; NaN if none were held out.
      logs: [P] logs of the coefficients.
    """

    law: Law
    coefficients: dict[str, float]
    predicted: np.ndarray
    error: float
    held_out_error: float
    logs: np.ndarray


class Band(NamedTuple):
    """Percentiles over resampled runs: of the predictions [J], and of each coefficient."""

    low: np.ndarray
    high: np.ndarray
    coefficients: Mapping[str, tuple[float, float]]


def predict(law: Law, logs_P: np.ndarray, parameters, tokens) -> np.ndarray:
    """Losses of runs by a law with these logs of its coefficients."""
    log_terms = law.log_terms(logs_P, *(np.log(np.asarray(x, float)) for x in (parameters, tokens)))
    return np.exp(np.clip(log_terms, -200, 200)).sum(axis=0)


def fit(
    law: Law,
    losses,
    parameters,
    tokens,
    *,
    held_out=None,
    starts: int = 16,
    seed: int = 0,
    huber: float | None = 1e-3,
) -> Fit:
    """Fits a law: the best of many starts.

    Minimises sum_j Huber(log L_j - log predicted_j) over the logs of the coefficients, which so
    stay positive; with `huber=None`, sum_j (L_j - predicted_j)^2.

    Args:
      law: one of LAWS.
      losses: [J] final losses.
      parameters: [J] N.
      tokens: [J] D.
      held_out: [J] bool, runs to predict and not to fit, or None.
      starts: number of random starts.
      seed: of the starts.
      huber: where the loss turns from squared to linear, in log loss; that of arXiv 2203.15556.

    Raises:
      ValueError: fewer runs to fit than coefficients, shapes that differ, values not positive, or
        runs that do not differ in N or in D.
    """
    losses, parameters, tokens = (np.asarray(x, np.float64) for x in (losses, parameters, tokens))
    if losses.ndim != 1 or losses.shape != parameters.shape or losses.shape != tokens.shape:
        raise ValueError("losses, parameters and tokens must be [J]")
    if not all((x > 0).all() and np.isfinite(x).all() for x in (losses, parameters, tokens)):
        raise ValueError("losses, parameters and tokens must be positive and finite")
    held_out = np.zeros(losses.shape, bool) if held_out is None else np.asarray(held_out, bool)
    fitted = ~held_out
    different = {*zip(parameters[fitted].tolist(), tokens[fitted].tolist(), strict=True)}
    if len(different) < len(law.coefficients):
        raise ValueError(
            f"{len(different)} different runs do not determine the {len(law.coefficients)} "
            f"coefficients of {law.name}"
        )
    if any(len(set(x[fitted].tolist())) < 2 for x in (parameters, tokens)):
        raise ValueError(f"{law.name} needs runs of several sizes and of several lengths")
    rng = np.random.default_rng(seed)
    best = None
    for start in _starts(law, losses[fitted], parameters[fitted], tokens[fitted], rng, starts):
        found = _solve(law, start, losses[fitted], parameters[fitted], tokens[fitted], huber)
        if best is None or found.cost < best.cost:
            best = found
    return _fit(law, best.x, losses, parameters, tokens, fitted)


def most_flops(rows: Sequence[Row]) -> np.ndarray:
    """[J] bool, the runs of the most FLOPs: a law is asked for what is beyond its own runs."""
    flops_J = np.array([row.flops for row in rows])
    return flops_J >= flops_J.max() * (1 - 1e-9)


def columns(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses, parameters and tokens of runs, float64 [J] each, as `fit` takes them."""
    return tuple(
        np.array([getattr(row, key) for row in rows], np.float64)
        for key in ("loss", "parameters", "tokens")
    )


def bootstrap(
    found: Fit,
    losses,
    parameters,
    tokens,
    *,
    held_out=None,
    repeats: int = 200,
    confidence: float = 0.9,
    seed: int = 0,
    huber: float | None = 1e-3,
) -> Band:
    """Bands of the predictions: the law fitted again to runs drawn with replacement.

    Each repeat draws as many of the fitted runs as there are, starts at the fitted coefficients,
    and is drawn again where it has too few different runs. The bands hold what another set of
    runs would change, not that the law is wrong beyond them.
    """
    losses, parameters, tokens = (np.asarray(x, np.float64) for x in (losses, parameters, tokens))
    held_out = np.zeros(losses.shape, bool) if held_out is None else np.asarray(held_out, bool)
    fitted, rng = np.flatnonzero(~held_out), np.random.default_rng(seed)
    logs = []
    while len(logs) < repeats:
        drawn = rng.choice(fitted, fitted.size)
        different = {*zip(parameters[drawn].tolist(), tokens[drawn].tolist(), strict=True)}
        enough = len(different) >= len(found.law.coefficients)
        if enough and all(len(set(x[drawn].tolist())) > 1 for x in (parameters, tokens)):
            data = (losses[drawn], parameters[drawn], tokens[drawn])
            logs.append(_solve(found.law, found.logs, *data, huber).x)
    predictions = np.stack([predict(found.law, x, parameters, tokens) for x in logs])
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    low, high = np.percentile(predictions, tails, axis=0)
    ends = np.percentile(np.exp(np.stack(logs)), tails, axis=0).T.tolist()
    return Band(low, high, dict(zip(found.law.coefficients, map(tuple, ends), strict=True)))


def _starts(law, losses, parameters, tokens, rng, count):
    """Terms share the smallest loss and what is above it at random, in the middle of the runs."""
    log_n, log_d = np.log(parameters), np.log(tokens)
    middle = (np.array([log_n.mean()]), np.array([log_d.mean()]))
    for _ in range(count):
        logs = np.zeros(len(law.coefficients))
        for i, name in enumerate(law.coefficients):
            if name in law.exponents:
                logs[i] = rng.normal(math.log(0.25), 0.5)
        shares = rng.dirichlet(np.ones(len(logs) - len(law.exponents)))
        # With factors of 1 the terms are pure powers: factors make them the shares.
        powers = law.log_terms(logs, *middle)[:, 0]
        logs[: len(shares)] = np.log(shares + 1e-3) + np.log(losses.mean()) - powers
        yield logs


def _solve(law, start, losses, parameters, tokens, huber):
    from scipy.optimize import least_squares

    def residuals(logs):
        predicted = predict(law, logs, parameters, tokens)
        return predicted - losses if huber is None else np.log(predicted) - np.log(losses)

    return least_squares(
        residuals,
        np.clip(start, -29, 69),
        bounds=(-30, 70),
        loss="linear" if huber is None else "huber",
        f_scale=huber or 1.0,
        x_scale="jac",
        max_nfev=400,
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
    )


def _fit(law, logs, losses, parameters, tokens, fitted) -> Fit:
    predicted = predict(law, logs, parameters, tokens)
    errors = np.abs(predicted - losses) / losses
    coefficients = dict(zip(law.coefficients, np.exp(logs).tolist(), strict=True))
    held = float(errors[~fitted].mean()) if not fitted.all() else math.nan
    return Fit(law, coefficients, predicted, float(errors[fitted].mean()), held, logs)
