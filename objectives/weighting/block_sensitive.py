"""Tokens that suffer when attention is cut into blocks."""

import jax

from objectives.weighting.base import (
    Weighting,
    check_number,
    multiply,
    reference,
    scale_to_unit,
    stateless,
)


def block_sensitive(strength: float = 1.0) -> Weighting:
    """w = d * (1 + strength * norm(l - l_full)), norm(x) = (x - min) / (max - min + 1e-8) in a row.

    l is the loss of the model that is trained, with attention in blocks; l_full that of a model
    with full attention. After "Towards Generalization of Block Attention" (arXiv 2605.15913).

    UNCONFIRMED: the paper weights the tokens of a distillation by how much blocks change their
    prediction, in a form that was not available; this one is ours. strength = 0 is cross-entropy.

    Needs the reference "full_nll": the losses l_full, [B, T], nats.

    Args:
      strength: extra weight of the tokens that blocks harm most, at least 0; 0 is off.

    Raises:
      ValueError: a negative `strength`.
    """
    check_number("strength", strength, least=0)

    def weigh(statistics, batch, references, state, step):
        harm_BT = jax.lax.stop_gradient(statistics.nll) - reference(references, "full_nll")
        scaled_BT = scale_to_unit(harm_BT, batch["weights"] != 0, axis=1)
        return multiply(batch, 1 + strength * scaled_BT), state, {}

    return Weighting(stateless, weigh, uses_statistics=True, references=("full_nll",))
