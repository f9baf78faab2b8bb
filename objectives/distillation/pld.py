"""Plackett-Luce distillation: the student ranks tokens as the teacher does.

B batch, T length, N tokens of a list.
"""

import jax
import jax.numpy as jnp
from jax import lax

from objectives.distillation.ranking import top_tokens
from objectives.distillation.selected import selected_statistics
from objectives.distillation.sums import LEFT_OUT
from objectives.distillation.taught import statistics_of_teacher
from objectives.losses.base import Loss
from objectives.vocabulary import vocabulary_size
from objectives.weighting.base import check_number


def pld(top: int = 64) -> Loss:
    """l = -sum_k a_k (s_k - log sum over j >= k of exp(s_j)), in the order of the teacher.

    Plackett-Luce distillation. The list begins with the target, then come all other tokens by
    descending logit of the teacher; s are the student's logits, and a_k the teacher's probability
    of the k-th token. It is convex in s and does not change with a shift of them. With a = (1, 0,
    0, ...) it is cross-entropy, with equal a the likelihood of the whole order (ListMLE).

    OURS, for a large vocabulary: the sum ends after the target and the teacher's `top` likeliest
    other tokens. The sums over j >= k still run over the whole vocabulary, so that nothing but the
    summands of the least a_k is left out.

    Two passes over the vocabulary for the teacher and one for the student, forward.

    Args:
      top: tokens of the list besides the target, at least 1.

    Raises:
      ValueError: a number below 1.
    """
    check_number("top", top, least=1)

    def statistics(inputs):
        hidden, head, scores = inputs.teachers["teacher"]
        of_teacher = statistics_of_teacher(inputs)

        def score(head_DK, start):
            u_BTK = scores.logits(hidden, head_DK)
            is_target_BTK = (inputs.targets - start)[..., None] == jnp.arange(u_BTK.shape[-1])
            return jnp.where(is_target_BTK, -jnp.inf, u_BTK)

        count = min(top, vocabulary_size(head, inputs.axis) - 1)
        u_BTN, ids_BTN = top_tokens(score, head, count, inputs.block_size, inputs.axis)
        u_BTN -= of_teacher.logsumexp[..., None]
        amounts_BTN = jnp.exp(jnp.concatenate([-of_teacher.nll[..., None], u_BTN], axis=-1))
        ids_BTN = jnp.concatenate([inputs.targets[..., None], ids_BTN], axis=-1)
        found, selected = selected_statistics(inputs, ids_BTN)
        loss_BT = plackett_luce(selected.logits, selected.rest, amounts_BTN)
        return found._replace(other_loss=loss_BT)

    return Loss(statistics=statistics, teachers=("teacher",))


def plackett_luce(s_BTN: jax.Array, rest_BT: jax.Array, amounts_BTN: jax.Array) -> jax.Array:
    """-sum_k a_k (s_k - log sum over j >= k of exp(s_j)), [B, T].

    Args:
      s_BTN: logits in the order of the list.
      rest_BT: log-sum-exp of all tokens that come after the list, -inf where there are none.
      amounts_BTN: a.
    """
    rest_BT = jnp.where(rest_BT == -jnp.inf, LEFT_OUT, rest_BT)
    all_BTN = jnp.concatenate([s_BTN, rest_BT[..., None]], axis=-1)
    # Before any arithmetic: 0 * NaN is NaN, and a token without weight passes nothing.
    bad_BT = ~(jnp.isfinite(all_BTN).all(-1) & jnp.isfinite(amounts_BTN).all(-1))
    all_BTN, amounts_BTN = (jnp.where(bad_BT[..., None], 0, x) for x in (all_BTN, amounts_BTN))
    after_BTN = lax.cumlogsumexp(all_BTN, axis=all_BTN.ndim - 1, reverse=True)
    loss_BT = -jnp.sum(amounts_BTN * (all_BTN - after_BTN)[..., :-1], axis=-1)
    return jnp.where(bad_BT, jnp.nan, loss_BT)
