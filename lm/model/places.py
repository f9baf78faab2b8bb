"""What a layer's attention is told of positions: its rotations and how far it sees.

B batch, T length, H head width, L layers, C kinds of layers in one model.

`model.layer_pattern` has a letter for each kind of layer, repeated over the layers: G sees all of
its segment, L the `model.window` last tokens (itself included), N as G but without rotary
positions. Gemma 3 is LLLLLG, SmolLM3 GGGN, a plain Transformer G.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.model.config import ModelConfig
from lm.model.rotary import rope_angles

# A window that reaches every token.
_EVERYTHING = 2**30


class Place(NamedTuple):
    """For one layer.

    Attributes:
      angles: sine and cosine of the rotary angles, [B, T, R/2]; None without rotary positions.
      window: tokens that a query sees, itself included; None is all of its segment.
    """

    angles: tuple[jax.Array, jax.Array] | None
    window: jax.Array | int | None


class Places(NamedTuple):
    """For all layers: the places of the kinds that occur, and the kind of each layer.

    Attributes:
      of_kind: a Place for each letter that occurs, in alphabetical order.
      kind_L: index into `of_kind` of each layer; None where there is one kind.
    """

    of_kind: tuple[Place, ...]
    kind_L: jax.Array | None

    def of_layer(self, kind: Any) -> Place:
        """The place of a layer of this kind, an entry of `kind_L`."""
        if kind is None:
            return self.of_kind[0]
        return jax.tree.map(lambda *x: jax.lax.select_n(kind, *x), *self.of_kind)

    def at(self, layer: Any) -> Place:
        """The place of a layer, from its number."""
        return self.of_layer(self.kind(layer))

    def kind(self, layer: Any) -> Any:
        """The kind of a layer, from its number; None where there is one kind."""
        return None if self.kind_L is None else self.kind_L[layer]


def make_places(config: ModelConfig, positions_BT: jax.Array) -> Places:
    """The places of a forward pass.

    Args:
      config: the architecture.
      positions_BT: int32, of each token in its document.
    """
    c = config
    pattern = [c.layer_pattern[i % len(c.layer_pattern)] for i in range(c.layers)]
    letters = sorted(set(pattern))
    if letters == ["G"]:
        return Places((Place(_angles(c, "G", positions_BT), None),), None)
    if len(letters) == 1:
        window = c.window if letters == ["L"] else None
        return Places((Place(_angles(c, letters[0], positions_BT), window),), None)
    # Of one structure, so that a layer in the loop can select its own.
    of_kind = []
    for letter in letters:
        angles = _angles(c, letter, positions_BT)
        if angles is None and c.positions == "rotary":
            angles = tuple(f(_zeros(c, positions_BT)) for f in (jnp.sin, jnp.cos))
        of_kind.append(Place(angles, jnp.int32(c.window if letter == "L" else _EVERYTHING)))
    kind_L = jnp.array([letters.index(letter) for letter in pattern], jnp.int32)
    return Places(tuple(of_kind), kind_L)


def _angles(c: ModelConfig, letter: str, positions_BT: jax.Array):
    if c.positions != "rotary" or letter == "N":
        return None
    return rope_angles(positions_BT, c.rope(local=letter == "L"))


def _zeros(c: ModelConfig, positions_BT: jax.Array) -> jax.Array:
    return jnp.zeros((*positions_BT.shape, c.rotary_width // 2), jnp.float32)
