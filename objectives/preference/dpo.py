"""Direct preference optimisation, and its forms for labels that may be wrong."""

import jax

from objectives.objective import Objective
from objectives.preference.base import REFERENCE, Judge, Verdict, pairwise, per_token, scaled
from objectives.weighting.base import check_number


def dpo(
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    robust: bool = False,
    reference_free: bool = False,
    length_normalised: bool = False,
) -> Objective:
    """-log sigmoid(beta * (u_w - u_l)), u = sum over an answer of log p - log p_reference.

    arXiv 2305.18290, equation 7; mean over the pairs of the batch. With h = beta * (u_w - u_l) and
    eps = `label_smoothing`, the probability that a label is the wrong way round:

      conservative  -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)     the paper's authors' note
      robust        (-(1 - eps) log sigmoid(h) + eps log sigmoid(-h)) / (1 - 2 eps)
                    arXiv 2403.00409: its mean over labels flipped with probability eps is the loss
                    on the right labels

    Without a reference u = sum log p. Length-normalised u are means over the tokens of an answer.
    At u_w = u_l the loss is log 2. Needs the reference "reference_nll" unless `reference_free`.

    Args:
      beta: strength of the reference, above 0.
      label_smoothing: share of labels that are wrong, in [0, 0.5).
      robust: the unbiased form in place of the conservative one; needs `label_smoothing` above 0.
      reference_free: compare with a uniform reference.
      length_normalised: divide by the number of tokens of the answer.

    Raises:
      ValueError: a bad number, or `robust` without `label_smoothing`.
    """
    return pairwise(
        judge(beta, label_smoothing, robust, length_normalised),
        references=() if reference_free else (REFERENCE,),
    )


def judge(
    beta: float,
    label_smoothing: float = 0.0,
    robust: bool = False,
    length_normalised: bool = False,
) -> Judge:
    """The loss of `dpo` as a function of the log-ratios of answers; its arguments are the same.

    Raises:
      ValueError: as `dpo`.
    """
    check_number("beta", beta, above=0)
    check_smoothing(label_smoothing)
    if robust and not label_smoothing:
        raise ValueError("robust=True must have label_smoothing above 0")

    def verdict(pairs):
        rewards = per_token(pairs.log_ratio, pairs) if length_normalised else pairs.log_ratio
        rewards = scaled(rewards, beta)
        loss_BP = smoothed(rewards.chosen - rewards.rejected, label_smoothing, robust)
        return Verdict(loss_BP, rewards)

    return verdict


def check_smoothing(label_smoothing: float) -> None:
    """Raises ValueError for a share of wrong labels that is not in [0, 0.5)."""
    check_number("label_smoothing", label_smoothing, least=0)
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be below 0.5")


def smoothed(margin: jax.Array, label_smoothing: float = 0.0, robust: bool = False) -> jax.Array:
    """-log sigmoid(margin), in the form for labels of which a share is wrong; see `dpo`."""
    right = -jax.nn.log_sigmoid(margin)
    if not label_smoothing:
        return right
    wrong = -jax.nn.log_sigmoid(-margin)
    if robust:
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong
