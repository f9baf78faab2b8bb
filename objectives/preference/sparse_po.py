"""SparsePO: masks on the rewards and on the divergences of tokens.

B rows, T tokens, D width, L layers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from objectives.losses.base import CROSS_ENTROPY
from objectives.objective import Objective
from objectives.preference.answers import Sides, side_weights
from objectives.preference.base import (
    Verdict,
    mean_of_answers,
    pairwise,
)
from objectives.preference.dpo import smoothed
from objectives.preference.npo import taught
from objectives.weighting.base import check_name, check_number

# What a mask is on; the other one is 1.
MASKED = ("both", "rewards", "divergences")


def sparse_po(
    beta: float = 0.1,
    mask: str = "ones",
    masked: str = "both",
    divergence: float = 1.0,
) -> Objective:
    """-log sigmoid(beta * ((u_w - u_l) - (delta_l - delta_w))), u and delta masked sums of tokens.

    SparsePO (arXiv 2410.05102), the sign as in the authors' code:

      u = sum over an answer of m_u (log p - log p_reference)
      delta = divergence * sum over an answer of m_d KL(p_reference || p), over the vocabulary

    With masks of 1 it is the sequential divergence of TDPO (arXiv 2404.11999), its first form with
    alpha = 1. The mask "activations" is that of MaPO: the mean over the units of the reference's
    activations, scaled to [0, 1] over the tokens of an answer, and a constant to gradients. Here
    the activations are the states in front of the reference's head; the authors' code averages
    such masks over the layers and kinds of activations.

    The masks that are learned, `learned_mask`, are not an option: their parameters would read all
    layers of the reference. Nor is their penalty, the sum of their entries.

    Reported besides: "reference_kl", the mean divergence over the tokens of both answers; rewards
    are beta * (u + delta).

    Needs the references "reference_nll" and "teacher", the same model.

    Args:
      beta: strength of the reference, above 0. The paper's is 0.1 for helpful and harmless
        answers, 0.8 elsewhere.
      mask: ones | activations.
      masked: both (one common mask) | rewards (m_d = 1) | divergences (m_u = 1).
      divergence: factor on delta, at least 0; ours. 0 is `dpo` where masks are 1, and needs no
        "teacher" there.

    Raises:
      ValueError: a bad number or name.
    """
    check_number("beta", beta, above=0)
    check_name("mask", mask, ("ones", "activations"))
    check_name("masked", masked, MASKED)
    check_number("divergence", divergence, least=0)
    uses_teacher = divergence > 0 or mask != "ones"
    on_rewards = mask != "ones" and masked != "divergences"
    on_divergences = mask != "ones" and masked != "rewards"

    def multiplier(aux, batch, references):
        return activation_mask(batch, aux["reference_hidden"])

    def values(statistics, aux, batch, references):
        divergence_BT = statistics.other_loss
        if on_divergences:
            live_BT = batch["weights"] != 0
            mask_BT = jax.lax.stop_gradient(multiplier(aux, batch, references))
            divergence_BT = mask_BT * jnp.where(live_BT, divergence_BT, 0.0)
        return {"divergence": divergence_BT}

    def judge(pairs):
        def reward(ratio_BP, divergence_BP):
            return beta * (ratio_BP + divergence * divergence_BP)

        rewards = Sides(*(beta * ratio_BP for ratio_BP in pairs.log_ratio))
        if divergence:
            both = zip(pairs.log_ratio, pairs.further["divergence"], strict=True)
            rewards = Sides(*(reward(*one) for one in both))
        return Verdict(smoothed(rewards.chosen - rewards.rejected), rewards)

    def further(pairs, statistics, batch, totals):
        return {"reference_kl": mean_of_answers(batch, statistics.other_loss, totals)}

    return pairwise(
        judge,
        multiplier=multiplier if on_rewards else None,
        values=values if divergence else None,
        further=further if uses_teacher else None,
        loss=taught() if uses_teacher else CROSS_ENTROPY,
    )._replace(reference_taps={"hidden": lambda batch: ()} if mask != "ones" else {})


def activation_mask(batch: Mapping[str, jax.Array], activations_BTD: jax.Array) -> jax.Array:
    """MaPO's mask: the mean over the units, scaled to [0, 1] over the tokens of each answer.

    (mean - min) / (max - min), [B, T] float32; 0 at what is no token of an answer, and 1 where all
    means of an answer are equal. (The authors' code makes z-scores first, which the scaling
    undoes.)
    """
    mean_BT = jnp.mean(activations_BTD.astype(jnp.float32), axis=-1)
    ids_BT = jnp.maximum(batch["pair_ids"], 0)
    mask_BT = jnp.zeros_like(mean_BT)
    for side_BT in side_weights(batch):
        live_BT = side_BT != 0

        def extreme(values_BT, of=live_BT):
            values_BT = jnp.where(of, values_BT, -jnp.inf)
            found_BP = jax.vmap(lambda x_T, id_T: jax.ops.segment_max(x_T, id_T, x_T.size))(
                values_BT, ids_BT
            )
            return jnp.take_along_axis(found_BP, ids_BT, axis=1)

        high_BT, low_BT = extreme(mean_BT), -extreme(-mean_BT)
        span_BT = high_BT - low_BT
        flat_BT = span_BT == 0
        scaled_BT = (mean_BT - low_BT) / jnp.where(flat_BT, 1.0, span_BT)
        mask_BT = jnp.where(live_BT, jnp.where(flat_BT, 1.0, scaled_BT), mask_BT)
    return mask_BT


def learned_mask(params: Mapping[str, jax.Array], states_LBTD: jax.Array) -> jax.Array:
    """SparsePO's mask: relu(mixer . [relu(w_l . LN(h_l) + b_l) of every layer l]), [B, T].

    One layer normalisation serves all layers. Without the authors' dropout of 0.1.

    Args:
      params: "scale" and "offset" of the normalisation, [D]; "weights" [L, D] and "biases" [L] of
        the layers; "mixer" [L].
      states_LBTD: the reference's hidden states of all layers.
    """
    x_LBTD = states_LBTD.astype(jnp.float32)
    centred_LBTD = x_LBTD - jnp.mean(x_LBTD, -1, keepdims=True)
    variance_LBT1 = jnp.mean(jnp.square(centred_LBTD), -1, keepdims=True)
    x_LBTD = centred_LBTD / jnp.sqrt(variance_LBT1 + 1e-5) * params["scale"] + params["offset"]
    scores_LBT = jnp.einsum("lbtd,ld->lbt", x_LBTD, params["weights"])
    scores_LBT = jax.nn.relu(scores_LBT + params["biases"][:, None, None])
    return jax.nn.relu(jnp.einsum("lbt,l->bt", scores_LBT, params["mixer"]))
