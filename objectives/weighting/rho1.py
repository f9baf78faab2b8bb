"""Selective language modelling: the tokens with the largest excess loss over a reference model."""

import jax
import jax.numpy as jnp

from objectives.weighting import selection
from objectives.weighting.base import Weighting, multiply, reference, stateless


def rho1(keep: float = 0.6) -> Weighting:
    """w = d * [l - l_ref is among the highest ceil(keep * N) of the N targets of the batch].

    Rho-1 (arXiv 2404.07965). The excess is signed; the choice is exact over the global,
    accumulated batch (the paper's code is not public). The paper's loss is the mean over kept
    tokens, normalisation `kept`; its keep is 0.6 for a model of 1.1 billion parameters and 0.7 for
    one of 7 billion. keep = 1 is cross-entropy.

    Needs the reference "reference_nll": the per-token losses l_ref, [B, T], nats.

    Args:
      keep: share of the targets of the batch that count, in (0, 1].

    Raises:
      ValueError: `keep` outside of (0, 1].
    """
    selection.check_share("keep", keep)

    def weigh(statistics, batch, references, state, step):
        excess_BT = jax.lax.stop_gradient(statistics.nll) - reference(references, "reference_nll")
        chosen_BT = selection.highest(excess_BT, batch["weights"] != 0, keep, axis=None)
        multiplier_BT = jnp.where(jnp.isnan(excess_BT), jnp.nan, chosen_BT)
        return multiply(batch, multiplier_BT), state, {}

    return Weighting(stateless, weigh, uses_statistics=True, references=("reference_nll",))
