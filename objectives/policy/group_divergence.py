"""How far the predictions of a group are apart, as a function of the model that is trained.

B rows, T tokens, V vocabulary, K one block of the vocabulary, N = B T slots of places of groups.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from objectives.cross_entropy import TokenStatistics
from objectives.losses.base import Inputs
from objectives.policy.answers import find_answers, places, select
from objectives.vocabulary import for_each_block, products
from objectives.weighting.samples import find_samples, sample_sums, spread

# The bound of TW-GRPO's differences of log-probabilities, +-11.
_LARGEST_DIFFERENCE = 11.0


def group_divergence(
    inputs: Inputs, statistics: TokenStatistics, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """The divergence of a group at the place of each drawn target, [B, T] float32, nats; else 0.

      mean over the group of sum_v (exp(D) - D - 1),  D = clip(mean log p - log p, -11, 11)

    TW-GRPO's token_kl as its released code has it (longmalongma/TW-GRPO), with a gradient in both
    log p and their mean: a member that has ended counts as a uniform distribution. A block of the
    vocabulary exists at a time, forward and backward; the members of a group may be in any rows.
    That of the sampler, without a gradient, is `lm.model.drawn.group_divergence`.

    Args:
      inputs: hidden states and head of all rows, with a whole vocabulary.
      statistics: of the softmax of the logits, soft-capped and tempered as `inputs` says.
      batch: with "group_ids".
    """
    answers, ids_BT = find_answers(batch), batch["group_ids"]
    live_BT, places_BT = answers.live_BT, places(answers).astype(jnp.int32)
    ones_BT, of_firsts_BT = (x.astype(jnp.float32) for x in (live_BT, places_BT == 1))
    groups = find_samples({"sample_ids": ids_BT, "weights": answers.weights_BT})
    members_BT = select(answers, spread(groups, sample_sums(groups, of_firsts_BT)[0]))
    # A place of a group is a sample.
    keys_BT = jnp.where(ids_BT >= 0, ids_BT * ids_BT.shape[1] + places_BT, -1)
    here = find_samples({"sample_ids": keys_BT, "weights": answers.weights_BT})
    members_BT = jnp.maximum(members_BT, 1.0)
    ended_BT = members_BT - select(answers, spread(here, sample_sums(here, ones_BT)[0]))
    uniform = -jnp.log(float(inputs.head.shape[1]))
    hidden_BTD = jnp.where(live_BT[..., None], inputs.hidden, 0)
    logsumexp_BT = select(answers, statistics.logsumexp)
    scores = products(inputs.softcap, inputs.temperature)

    @jax.checkpoint
    def of_block(head_DK):
        """Sums over the block: of a token, and of a member that has ended."""
        log_p_BTK = scores.logits(hidden_BTD, head_DK) - logsumexp_BT[..., None]
        log_p_BTK = jnp.where(live_BT[..., None], log_p_BTK, 0.0)
        sums_NK = jnp.zeros((here.live_N.size, log_p_BTK.shape[-1]), jnp.float32)
        sums_NK = sums_NK.at[here.slots_BT].add(log_p_BTK, mode="drop")
        sums_BTK = sums_NK[jnp.minimum(here.slots_BT, here.live_N.size - 1)]
        mean_BTK = (sums_BTK + ended_BT[..., None] * uniform) / members_BT[..., None]
        return _apart(mean_BTK - log_p_BTK), _apart(mean_BTK - uniform)

    def add_block(sums, head_DK, start):
        block = of_block(head_DK)
        return block if sums is None else jax.tree.map(jnp.add, sums, block)

    own_BT, of_ended_BT = for_each_block(inputs.head, inputs.block_size, add_block, None)
    total_BT = spread(here, sample_sums(here, select(answers, own_BT))[0])
    return select(answers, (total_BT + ended_BT * of_ended_BT) / members_BT)


def _apart(difference_BTK: jax.Array) -> jax.Array:
    """sum_v (exp(D) - D - 1), [B, T], without the loss of digits near 0."""
    bound = _LARGEST_DIFFERENCE
    difference_BTK = jnp.clip(difference_BTK, -bound, bound)
    return jnp.sum(jnp.expm1(difference_BTK) - difference_BTK, axis=-1)
