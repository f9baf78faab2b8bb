"""Universal self-knowledge distillation: a model that makes its own soft labels.

B batch, T length, D width, V vocabulary, K one block of the vocabulary, N tokens of a list.
"""

import jax
import jax.numpy as jnp

from objectives.cross_entropy import token_statistics
from objectives.distillation.ranking import top_tokens
from objectives.distillation.selected import selected_statistics
from objectives.distillation.sums import LEFT_OUT
from objectives.losses.base import Loss, softmax
from objectives.objective import Objective
from objectives.terms import Term, masked_sum
from objectives.vocabulary import as_head, products, total, vocabulary_size
from objectives.weighted import weighted
from objectives.weighting.base import check_name, check_number
from objectives.weighting.uskd import uskd

RANKS = ("probabilities", "released")
# Of the target in the labels of the weak head; the rest is spread over all tokens.
_SHARE_OF_TARGET = 0.9
_EPSILON = 1e-6


def self_knowledge(
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    top: int = 64,
    rank: str = "probabilities",
) -> Objective:
    """l = alpha w (-log p_y) - beta sum over v != y of z_v log p'_v + mu times that of a weak head.

    USKD whole (arXiv 2303.13005, and its released code), without a teacher. w = 1 + p_y^2 - its
    mean over the batch is that of the weighting `uskd`. p' is the distribution over the tokens that
    are not the target, and z_v, which is not differentiated, their soft labels: 1 / rank,
    normalised. The rank is that of p_v / (1 - p_y) + q_v / (1 - q_y), q being a weak head, a matrix
    that only training has and that learns labels with 0.9 on the target and 0.1 spread over all.

    OURS: the weak head of the paper reads features of a middle layer, this one the hidden states in
    front of the head; and labels are those of the `top` first ranks, 0 behind them.

    Args:
      alpha: factor of the target's term, above 0.
      beta: factor of the other tokens' term, at least 0.
      mu: factor of the weak head's loss, at least 0; .005 for ImageNet, .1 for CIFAR-100.
      top: ranks that have a label, at least 2.
      rank: probabilities, as above | released: the released code has log p_v / (1 - log p_y) in
        place of the first quotient.

    Raises:
      ValueError: an unknown name, a number out of its bounds.
    """
    check_number("alpha", alpha, above=0)
    check_number("beta", beta, least=0)
    check_number("mu", mu, least=0)
    check_number("top", top, least=2)
    check_name("rank", rank, RANKS)

    def losses(inputs, statistics):
        weak_head_DV = as_head(inputs.params["weak"], inputs.head, inputs.axis)
        weak = token_statistics(
            inputs.hidden,
            weak_head_DV,
            inputs.targets,
            block_size=inputs.block_size,
            axis=inputs.axis,
        )
        ids_BTN = _ranked(inputs, statistics, weak, weak_head_DV, top, rank)
        others_BT = _label_loss(inputs, ids_BTN)
        return beta * others_BT + mu * _smoothed(inputs, weak, weak_head_DV)

    loss = Loss(init=_init, losses=losses, prediction="softmax, beside a weak head")
    base = weighted(loss, uskd())

    def terms(statistics, aux, batch, prepared):
        of_target = masked_sum(prepared.rows["weights"], statistics.nll)
        of_others = masked_sum(batch["weights"], statistics.other_loss)
        found = base.terms(statistics, aux, batch, prepared)
        whole = Term(alpha * of_target + of_others, prepared.totals["weight"])
        return {**found, "loss": whole}

    return base._replace(terms=terms, differentiated=("nll", "other_loss"))


def _init(key, vocab_size, width):
    """The weak head, as a linear layer of the released code starts: uniform in +-1 / sqrt(D)."""
    bound = width**-0.5
    return {"weak": jax.random.uniform(key, (width, vocab_size), jnp.float32, -bound, bound)}


def _ranked(inputs, statistics, weak, weak_head_DV, top, rank) -> jax.Array:
    """The tokens of the first ranks, [B, T, N], the target among them if it has one."""
    hidden, head, scores = softmax(inputs)
    p_BT, q_BT = jnp.exp(-statistics.nll), jnp.exp(-weak.nll)

    def score(heads, start):
        del start
        log_p_BTK = scores.logits(hidden, heads[0]) - statistics.logsumexp[..., None]
        log_q_BTK = products().logits(hidden, heads[1]) - weak.logsumexp[..., None]
        of_weak_BTK = jnp.exp(log_q_BTK) / (1 - q_BT + _EPSILON)[..., None]
        if rank == "released":
            return of_weak_BTK + log_p_BTK / (1 + statistics.nll + _EPSILON)[..., None]
        return of_weak_BTK + jnp.exp(log_p_BTK) / (1 - p_BT + _EPSILON)[..., None]

    count = min(top, vocabulary_size(head, inputs.axis))
    return top_tokens(score, (head, weak_head_DV), count, inputs.block_size, inputs.axis)[1]


def _label_loss(inputs, ids_BTN) -> jax.Array:
    """Cross-entropy of p' with labels of 1 / rank, [B, T]."""
    targets_BT1 = inputs.targets[..., None]
    ids = jnp.concatenate([ids_BTN, targets_BT1], axis=-1)
    z_BTN, rest_BT = selected_statistics(inputs, ids)[1]
    rest_BT = jnp.where(rest_BT == -jnp.inf, LEFT_OUT, rest_BT)
    bad_BT = ~(jnp.isfinite(z_BTN).all(-1) & jnp.isfinite(rest_BT))
    z_BTN = jnp.where(bad_BT[..., None], 0, z_BTN[..., :-1])
    rest_BT = jnp.where(bad_BT, 0, rest_BT)
    is_other_BTN = ids_BTN != targets_BT1
    labels_BTN = jnp.where(is_other_BTN, 1 / (1 + jnp.arange(ids_BTN.shape[-1])), 0.0)
    labels_BTN /= labels_BTN.sum(-1, keepdims=True)
    all_BTN = jnp.where(is_other_BTN, z_BTN, -jnp.inf)
    normaliser_BT = jnp.logaddexp(jax.nn.logsumexp(all_BTN, axis=-1), rest_BT)
    return jnp.where(bad_BT, jnp.nan, normaliser_BT - jnp.sum(labels_BTN * z_BTN, axis=-1))


def _smoothed(inputs, weak, weak_head_DV) -> jax.Array:
    """Cross-entropy of the weak head with smoothed labels, [B, T]."""
    size = vocabulary_size(weak_head_DV, inputs.axis)
    # The mean of all logits is the product with the mean of the columns.
    mean_D = weak_head_DV.astype(jnp.float32).sum(-1) / size
    hidden_BTD = inputs.hidden.astype(jnp.float32)
    # Before any arithmetic: 0 * NaN is NaN; the loss is NaN all the same, for the others' is.
    hidden_BTD = jnp.where(jnp.isfinite(hidden_BTD).all(-1, keepdims=True), hidden_BTD, 0)
    mean_BT = total(jnp.einsum("btd,d->bt", hidden_BTD, mean_D), inputs.axis)
    to_all_BT = weak.logsumexp - mean_BT
    return _SHARE_OF_TARGET * weak.nll + (1 - _SHARE_OF_TARGET) * to_all_BT
