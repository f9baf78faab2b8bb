"""How far the ratio of a token may be from 1 before it is clipped.

B rows, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from objectives.policy.answers import Answers, places


class Bounds(NamedTuple):
    """Bounds of the ratios, scalars or [B, T], constants to gradients.

    Attributes:
      low: the smallest ratio.
      high: the largest ratio.
      dual: the largest ratio of a token with a negative advantage; infinite without dual clipping.
    """

    low: jax.Array
    high: jax.Array
    dual: jax.Array


def constant(low: float, high: float, dual: float = 0.0) -> Bounds:
    """Ratios in [1 - low, 1 + high]; each bound, and the dual one, is left out where it is 0."""
    return Bounds(
        jnp.float32(1 - low if low else 0.0),
        jnp.float32(1 + high if high else jnp.inf),
        jnp.float32(dual or jnp.inf),
    )


def by_position(answers: Answers, low: float, high: float, power: float) -> Bounds:
    """Log ratios in [-low t^power, high t^power], t the place in the answer from 1.

    CTPO (released code: horizon-llm/CTPO). The dual bound is the upper one, as there. A `power` of
    0 gives the same bounds at every place.
    """
    size_BT = jnp.maximum(places(answers), 1.0) ** power
    high_BT = jnp.exp(high * size_BT)
    return Bounds(jnp.exp(-low * size_BT), high_BT, high_BT)


def by_entropy(relative_BT: jax.Array, low: float, high: float, dual: float = 0.0) -> Bounds:
    """Wider bounds below for certain tokens, and above for uncertain ones: HAPO.

    With h = `relative_BT` in [-1, 1] ratios are in [1 - low (1 - h), 1 + high] where h <= 0, and in
    [1 - low, 1 + high (1 + h)] where h > 0.
    """
    below_BT, above_BT = jnp.minimum(relative_BT, 0.0), jnp.maximum(relative_BT, 0.0)
    return Bounds(1 - low * (1 - below_BT), 1 + high * (1 + above_BT), jnp.float32(dual or jnp.inf))
