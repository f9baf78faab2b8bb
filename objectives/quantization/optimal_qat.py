"""Compute-optimal QAT (arXiv 2509.22935): how much of a run to quantize, to how many bits.

Plain Python and NumPy in float64; scipy only inside the fit. Tokens, parameters and bits are
counts, losses are nats per token. N counts all parameters at the quantized width, and S is tokens
per parameter-byte, D / (N * bits / 8); whether the authors leave embeddings out of N is
unconfirmed, so N is the caller's to choose. log is the natural one.

    J  runs of a fit        P  coefficients of a law
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The one fitted number of the closed form (arXiv 2509.22935, from agreeing summaries); its mean
# absolute error in the fraction is 0.091.
FRACTION_COEFFICIENT = 6.7297


def tokens_per_parameter_byte(tokens: float, parameters: float, bits: float) -> float:
    """S = tokens / (parameters * bits / 8).

    Raises:
      ValueError: an argument that is not positive.
    """
    for name, value in (("tokens", tokens), ("parameters", parameters), ("bits", bits)):
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value}")
    return tokens / (parameters * bits / 8)


def optimal_qat_fraction(tokens: float, parameters: float, bits: float) -> float:
    """Share of `tokens` to train with quantization: exp(-6.7297 / ln S), 0 where S <= 1.

    That is exp(ln S - 6.7297 / ln S) / S of arXiv 2509.22935, simplified. It rises with S from 0
    to 1 and depends on the width only through S (see `tokens_per_parameter_byte`).

    Args:
      tokens: of the whole run, both phases.
      parameters: number of weights, all at the quantized width.
      bits: width of the quantized weights.

    Raises:
      ValueError: an argument that is not positive.
    """
    ratio = tokens_per_parameter_byte(tokens, parameters, bits)
    if ratio <= 1:
        return 0.0
    return math.exp(-FRACTION_COEFFICIENT / math.log(ratio))


class QATLaw(NamedTuple):
    """Coefficients of the loss law of arXiv 2509.22935 (its fitted values are unknown to us).

      L = alpha + beta D^-gamma + zeta N^-eta
          + theta 2^(-kappa b)                                     error of any training
          + phi 2^(-chi b) N^-psi S_qat^-omega                     penalty of a short QAT phase
          + lambda_ 2^(-mu b) N^-nu S_fp^-xi S_qat^-rho            interaction of the phases

    with D = D_fp + D_qat, b bits and S = D / (N b / 8) of each phase. The symbols of the first line
    are from memory. All are positive. The interaction has S_fp in the denominator in every summary
    of the paper, which penalises a run without a full-precision phase.
    """

    alpha: float
    beta: float
    gamma: float
    zeta: float
    eta: float
    theta: float
    kappa: float
    phi: float
    chi: float
    psi: float
    omega: float
    lambda_: float
    mu: float
    nu: float
    xi: float
    rho: float


# Of each term of the law: its factor, and the exponents with the feature that each multiplies:
# log term = log factor - sum exponent * feature.
_TERMS = (
    ("alpha", {}),
    ("beta", {"gamma": "log_tokens"}),
    ("zeta", {"eta": "log_parameters"}),
    ("theta", {"kappa": "bits"}),
    ("phi", {"chi": "bits", "psi": "log_parameters", "omega": "log_qat"}),
    ("lambda_", {"mu": "bits", "nu": "log_parameters", "xi": "log_fp", "rho": "log_qat"}),
)


def _features(parameters, qat_tokens, fp_tokens, bits) -> dict[str, np.ndarray]:
    parameters, qat, fp, bits = (
        np.asarray(a, np.float64) for a in (parameters, qat_tokens, fp_tokens, bits)
    )
    if not all((a > 0).all() for a in (parameters, qat, fp, bits)):
        raise ValueError("parameters, tokens of both phases and bits must be positive")
    nbytes = parameters * bits / 8
    return {
        "log_tokens": np.log(qat + fp),
        "log_parameters": np.log(parameters),
        "bits": bits * math.log(2),
        "log_qat": np.log(qat / nbytes),
        "log_fp": np.log(fp / nbytes),
    }


def qat_law_terms(law: QATLaw, parameters, qat_tokens, fp_tokens, bits) -> dict[str, np.ndarray]:
    """The six terms of `law` by the name of their factor; their sum is the loss.

    Args:
      law: coefficients.
      parameters: N. This and the others are positive numbers, or arrays that broadcast.
      qat_tokens: tokens of the quantized phase.
      fp_tokens: tokens of the full-precision phase.
      bits: width.

    Raises:
      ValueError: an argument that is not positive.
    """
    features, values = _features(parameters, qat_tokens, fp_tokens, bits), law._asdict()
    return {
        factor: values[factor]
        * np.exp(-sum((values[e] * features[f] for e, f in exponents.items()), np.float64(0)))
        for factor, exponents in _TERMS
    }


def qat_law(law: QATLaw, parameters, qat_tokens, fp_tokens, bits) -> np.ndarray:
    """Predicted loss at the end of a run, see `QATLaw` and `qat_law_terms`."""
    return sum(qat_law_terms(law, parameters, qat_tokens, fp_tokens, bits).values())


def best_fraction(law: QATLaw, tokens: float, parameters: float, bits: float) -> float:
    """The share f of QAT tokens of least predicted loss at a fixed total.

    With P and I the last two terms, it is the root of f / (1 - f) = (omega P + rho I) / (xi I); the
    loss is convex in f, so there is one.
    """

    def slope(fraction):  # d loss / d fraction, times f (1 - f)
        terms = qat_law_terms(law, parameters, fraction * tokens, (1 - fraction) * tokens, bits)
        penalty, interaction = terms["phi"], terms["lambda_"]
        pull = law.omega * penalty + law.rho * interaction
        return fraction * law.xi * interaction - (1 - fraction) * pull

    return _bisect(slope, 1e-9, 1 - 1e-9)


def best_loss(law: QATLaw, tokens: float, parameters: float, bits: float) -> float:
    """Predicted loss with the best split of `tokens`."""
    fraction = best_fraction(law, tokens, parameters, bits)
    return float(qat_law(law, parameters, fraction * tokens, (1 - fraction) * tokens, bits))


def best_bits(law: QATLaw, tokens: float, memory: float, widths: Sequence[float]) -> float:
    """Of `widths`, that of least predicted loss for a model of `memory` bytes, N = 8 memory / b."""
    return min(widths, key=lambda bits: best_loss(law, tokens, 8 * memory / bits, bits))


def wasted_tokens(
    law: QATLaw, tokens: float, parameters: float, bits: float, fraction: float
) -> float:
    """Tokens that a run with this QAT fraction spends beyond the fewest that reach its loss.

    A prediction of the law, not a measurement: the fewest are those with their own best fraction.
    """
    loss = float(qat_law(law, parameters, fraction * tokens, (1 - fraction) * tokens, bits))
    log_fewest = _bisect(
        lambda log_tokens: loss - best_loss(law, math.exp(log_tokens), parameters, bits),
        0.0,
        math.log(tokens),
    )
    return tokens - math.exp(log_fewest)


def _bisect(function, low: float, high: float) -> float:
    """Where an increasing function changes its sign, or the end nearest to that."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


class QATLawFit(NamedTuple):
    """A fitted law and how well it does: mean absolute errors of the loss, in nats."""

    law: QATLaw
    objective: float  # sum of the Huber losses over the runs that it was fitted on
    error: float  # on those runs
    held_out_error: float  # on the others; NaN if none were held out


def _check_runs(losses, runs, fitted) -> None:
    if losses.ndim != 1 or any(a.shape != losses.shape for a in runs):
        raise ValueError(
            f"losses and runs must be [J]; got {losses.shape}, {[a.shape for a in runs]}"
        )
    if not (losses > 0).all():
        raise ValueError("losses must be positive")
    if fitted.sum() < len(QATLaw._fields):
        raise ValueError(f"{fitted.sum()} runs do not determine {len(QATLaw._fields)} coefficients")


def _predictor(features, middle, index):
    """(logs of the coefficients [P]) -> log predicted losses [J] and their Jacobian [J, P]."""
    runs = len(next(iter(features.values())))

    def predict(logs_P):
        """log predicted losses [J] and their Jacobian [J, P] in the logs of the coefficients."""
        total_J, jacobian_JP = 0.0, np.zeros((runs, len(index)))
        for factor, exponents in _TERMS:
            log_term_J = np.full(runs, logs_P[index[factor]])
            slopes = {}
            for exponent, name in exponents.items():
                slopes[exponent] = -np.exp(logs_P[index[exponent]]) * (
                    features[name] - middle[name]
                )
                log_term_J = log_term_J + slopes[exponent]
            term_J = np.exp(np.clip(log_term_J, -200, 200))
            total_J = total_J + term_J
            jacobian_JP[:, index[factor]] = term_J
            for exponent, slope_J in slopes.items():
                jacobian_JP[:, index[exponent]] = term_J * slope_J
        return np.log(total_J), jacobian_JP / total_J[:, None]

    return predict


def _starting_points(index: dict[str, int], log_loss: float, starts: int, seed: int):
    """Random logarithms [P] of the coefficients, `starts` times.

    Exponents are around 0.5, and the terms share the mean loss exp(log_loss) at random.
    """
    rng = np.random.default_rng(seed)
    factors = [index[factor] for factor, _ in _TERMS]
    for _ in range(starts):
        start_P = rng.normal(math.log(0.5), 0.7, len(index))
        shares = rng.dirichlet(np.ones(len(factors)))
        start_P[factors] = np.log(shares + 1e-3) + log_loss
        yield start_P


def fit_qat_law(
    losses,
    parameters,
    qat_tokens,
    fp_tokens,
    bits,
    *,
    held_out=None,
    starts: int = 16,
    seed: int = 0,
    huber: float = 1e-3,
) -> QATLawFit:
    """Fits `QATLaw` to one's own runs: the best of many starts.

    Minimises sum_j Huber(log L_j - log predicted_j) over the logarithms of the coefficients (all
    stay positive), by scipy.optimize.least_squares with the analytic Jacobian, from random starts.
    The paper adds a regulariser towards the loss of full precision, of which no form is known: it
    is left out.

    Args:
      losses: [J] final losses of runs.
      parameters: [J], and so are the tokens of both phases and the bits.
      qat_tokens: of the quantized phase.
      fp_tokens: of the full-precision phase.
      bits: widths.
      held_out: [J] bool, runs to leave out of the fit and report the error on (the paper holds out
        its largest size), or None.
      starts: number of random starts.
      seed: of the starts.
      huber: where the loss turns from squared to linear, in log loss.

    Raises:
      ValueError: fewer than 16 runs to fit, shapes that differ, or losses that are not positive.
    """
    from scipy.optimize import least_squares

    losses = np.asarray(losses, np.float64)
    runs = [np.asarray(a, np.float64) for a in (parameters, qat_tokens, fp_tokens, bits)]
    held_out = np.zeros(losses.shape, bool) if held_out is None else np.asarray(held_out, bool)
    fitted = ~held_out
    _check_runs(losses, runs, fitted)

    features = {name: values[fitted] for name, values in _features(*runs).items()}
    log_losses_J = np.log(losses[fitted])
    # Around the middle of the runs: there a factor is the size of its term, and the exponents
    # hardly pull on the factors.
    middle = {name: values.mean() for name, values in features.items()}
    index = {name: i for i, name in enumerate(QATLaw._fields)}

    predict = _predictor(features, middle, index)
    best = None
    for start_P in _starting_points(index, log_losses_J.mean(), starts, seed):
        found = least_squares(
            lambda logs_P: predict(logs_P)[0] - log_losses_J,
            start_P,
            jac=lambda logs_P: predict(logs_P)[1],
            bounds=(-30, 10),
            loss="huber",
            f_scale=huber,
            x_scale="jac",
            max_nfev=400,
        )
        if best is None or found.cost < best.cost:
            best = found

    values = {name: math.exp(best.x[i]) for name, i in index.items()}
    for factor, exponents in _TERMS:
        values[factor] *= math.exp(sum(values[e] * middle[f] for e, f in exponents.items()))
    law = QATLaw(**values)
    errors_J = np.abs(qat_law(law, *runs) - losses)
    return QATLawFit(
        law,
        float(best.cost),
        float(errors_J[fitted].mean()),
        float(errors_J[held_out].mean()) if held_out.any() else math.nan,
    )
