"""TARS on text: DPO on answers of which some tokens were replaced.

B rows, T tokens.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from objectives.objective import Objective
from objectives.preference.base import REFERENCE, pairwise
from objectives.preference.dpo import judge
from objectives.weighting.base import check_number

# So that these draws are others than those of dropout and of losses from the same keys.
_PURPOSE = 7


def tars(beta: float = 0.1, share: float = 0.05, mask_token: int = -1) -> Objective:
    """The loss of `dpo` on answers of which a share of the tokens is replaced and not predicted.

    After arXiv 2507.21584, whose subject is models of images and text: there the tokens that the
    image explains least are replaced or masked, about 5% of them, their labels are dropped, and a
    second loss of `dpo` on a noised image and a term of spectra come on top. What is here is the
    perturbation of tokens alone: without an image, every token of an answer is replaced with the
    same probability, anew in every step. The policy and a reference that is a model read the same
    perturbed answers; a stored reference is that of the unperturbed ones and is refused.

    Needs the reference "reference_nll", not stored.

    Args:
      beta: strength of the reference, above 0.
      share: probability that a token of an answer is replaced, in [0, 1); 0 is `dpo`.
      mask_token: id that replaces a token; -1 is another token of the answers in the row.

    Raises:
      ValueError: a bad number.
    """
    check_number("share", share, least=0)
    if share >= 1:
        raise ValueError(f"share={share} must be below 1")
    check_number("mask_token", mask_token, least=-1)
    objective = pairwise(judge(beta))
    if not share:
        return objective
    return objective._replace(
        perturb=lambda batch: perturbed(batch, share, mask_token),
        batch_keys=(*objective.batch_keys, "keys"),
        computed_references=(REFERENCE,),
    )


def perturbed(
    batch: Mapping[str, jax.Array], share: float, mask_token: int = -1
) -> dict[str, jax.Array]:
    """The batch with tokens of answers replaced as inputs, and without weight as targets.

    A token is the target of the position before the one that it is the input of, so the last
    target of an answer is no input and stays.

    Args:
      batch: with pairs and random "keys", one a token.
      share: probability of a replacement.
      mask_token: see `tars`.
    """
    keys_BT = batch["keys"]
    # As long as the row: a token alone decides, wherever micro-batches and devices cut.
    draws_BT2 = jax.vmap(jax.vmap(lambda key: jax.random.uniform(_of(key), (2,))))(keys_BT)
    live_BT = (batch["weights"] != 0) & (batch["pair_ids"] >= 0)
    after_BT = jnp.pad(batch["segment_ids"][:, 1:], ((0, 0), (0, 1)))
    is_input_BT = live_BT & (after_BT == batch["segment_ids"])
    dropped_BT = is_input_BT & (draws_BT2[..., 0] < share)
    replaced_BT = jnp.pad(dropped_BT[:, :-1], ((0, 0), (1, 0)))
    new_BT = jnp.full_like(batch["tokens"], mask_token)
    if mask_token < 0:
        new_BT = _drawn(batch["targets"], live_BT, draws_BT2[..., 1])
    return {
        **batch,
        "tokens": jnp.where(replaced_BT, new_BT, batch["tokens"]),
        "weights": jnp.where(dropped_BT, 0.0, batch["weights"]),
    }


def _of(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, _PURPOSE)


def _drawn(targets_BT, live_BT, draws_BT):
    """For each position one of the row's targets in `live`, each with the same probability."""
    order_BT = jnp.argsort(~live_BT, axis=1, stable=True)
    count_B1 = jnp.sum(live_BT, axis=1, keepdims=True)
    place_BT = jnp.minimum((draws_BT * count_B1).astype(jnp.int32), jnp.maximum(count_B1 - 1, 0))
    return jnp.take_along_axis(targets_BT, jnp.take_along_axis(order_BT, place_BT, 1), 1)
