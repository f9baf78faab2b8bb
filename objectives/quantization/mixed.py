"""A stack of matrices of which every layer has a quantizer, and so a width, of its own.

Which quantizer a layer is on is data: a number beside the scale, so that a scan over layers
compiles one program for all widths, of which the layer's own branch alone runs, and so that widths
can change during training without another compilation.

L layers, I inputs, O output channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from objectives.quantization.base import Grid, Quantizer


class MixedScale(NamedTuple):
    """The scale of a `Mixed` quantizer, or the part of one layer inside a scan over layers.

    Attributes:
      scale: of the layers' quantizers, stacked; () where nothing is learned.
      index: number of the quantizer among `Mixed.members`, float32 [L, 1, 1] or [1, 1]. It is a
        float so that gradients may be taken in the whole tree of scales; its own is zero.
    """

    scale: Any
    index: jax.Array


class Mixed(NamedTuple):
    """A quantizer of a stack [L, I, O]; made by `mixed`. It stands where a `Quantizer` stands.

    `quantize`, `inside` and `grid` go by the index in the scale that they are given. `init`,
    `encode` and `decode`, which have none, go by `layers`; see `settle`.

    Attributes:
      members: quantizers with scales and grids of one shape.
      layers: number of the member of each layer.
    """

    members: tuple[Quantizer, ...]
    layers: tuple[int, ...]

    name = "mixed"

    @property
    def bits(self) -> float:
        """The mean width of the layers."""
        return sum(self.widths) / len(self.layers)

    @property
    def widths(self) -> tuple[float, ...]:
        """The width of each layer."""
        return tuple(self.members[i].bits for i in self.layers)

    @property
    def granularity(self) -> str:
        return self.members[0].granularity

    @property
    def group_size(self) -> int:
        return self.members[0].group_size

    @property
    def contraction_axis(self) -> int:
        return self.members[0].contraction_axis

    @property
    def levels(self) -> int:
        """The number of codes of the widest layer."""
        return max(self.members[i].levels for i in self.layers)

    def init(self, weights: jax.Array) -> MixedScale:
        """The first scale of every layer, and the indices that `layers` tells.

        Raises:
          ValueError: another number of layers, or members with scales or grids of other shapes.
        """
        self._check(weights)
        index_L = self._index()
        scale = jax.lax.map(lambda x: self._choose("init", *x), (index_L, weights))
        return MixedScale(scale, index_L[:, None, None])

    def move(self, weights: jax.Array, scale: MixedScale, index: jax.Array) -> MixedScale:
        """The scale with layers on other members, of numbers [L]: theirs begins anew."""
        fresh = jax.lax.map(lambda x: self._choose("init", *x), (index, weights))
        moved = (jnp.rint(scale.index.reshape(-1)) != index)[:, None, None]
        kept = jax.tree.map(lambda new, old: jnp.where(moved, new, old), fresh, scale.scale)
        return MixedScale(kept, index[:, None, None].astype(jnp.float32))

    def quantize(self, weights: jax.Array, scale: MixedScale) -> jax.Array:
        """Every layer on its grid: [L, I, O], or one layer [I, O] with its part of the scale."""
        return self._by_index("quantize", weights, scale)

    def inside(self, weights: jax.Array, scale: MixedScale) -> jax.Array:
        """Where the weights are within the clip ranges of their layers."""
        return self._by_index("inside", weights, scale)

    def grid(self, weights: jax.Array, scale: MixedScale) -> Grid:
        """The fixed numbers behind `quantize`, stacked over layers."""
        return self._by_index("grid", weights, scale)

    def encode(self, weights: jax.Array, grid: Grid) -> jax.Array:
        """uint8 codes [L, I, O], each layer's below the number of its own levels."""
        return jax.lax.map(lambda x: self._choose("encode", *x), (self._index(), weights, grid))

    def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """float32 weights [L, I, O]."""
        codes, grid = jax.tree.map(jnp.asarray, (codes, grid))
        return jax.lax.map(lambda x: self._choose("decode", *x), (self._index(), codes, grid))

    def _index(self) -> jax.Array:
        return jnp.asarray(self.layers, jnp.float32)

    def _choose(self, method: str, index, *arguments):
        branches = [getattr(member, method) for member in self.members]
        if len(branches) == 1:
            return branches[0](*arguments)
        # A moving average of indices is off by rounding: the nearest is meant.
        return jax.lax.switch(jnp.rint(index).astype(jnp.int32), branches, *arguments)

    def _by_index(self, method: str, weights, scale):
        def one(x):
            w_IO, (scale, index) = x
            return self._choose(method, index.reshape(()), w_IO, scale)

        if weights.ndim == 2:
            return one((weights, scale))
        return jax.lax.map(one, (weights, scale))

    def _check(self, weights) -> None:
        if weights.ndim != 3 or len(weights) != len(self.layers):
            raise ValueError(
                f"widths of {len(self.layers)} layers need weights [{len(self.layers)}, in, out]; "
                f"got {weights.shape}"
            )
        shapes = [
            jax.eval_shape(lambda w, q=member: (q.init(w), q.grid(w, q.init(w))), weights[0])
            for member in self.members
        ]
        for member, found in zip(self.members, shapes, strict=True):
            if found != shapes[0]:
                first = self.members[0]
                raise ValueError(
                    f"{first.name} with {first.bits:g} bits and {member.name} with "
                    f"{member.bits:g} bits have scales of other shapes: no layers of one stack"
                )


def mixed(quantizers: Sequence[Quantizer], choices: Sequence[Quantizer] = ()) -> Mixed:
    """The quantizer of a stack [L, I, O] whose layer l is on quantizers[l].

    Its learned scales are float32 [L, ...] as those of one quantizer, in a `MixedScale`. Gradients
    in weights and scales are those of the layers' own quantizers.

    Args:
      quantizers: one a layer; those with one layout and scales of one shape, such as `absmax` of
        several widths, or `seq` and `lsq`.
      choices: further ones that a layer may be put on later, by its index.

    Raises:
      ValueError: no layer at all, or other layouts. From `init`: scales of other shapes.
    """
    if not quantizers:
        raise ValueError("mixed needs the quantizer of at least one layer")
    members = tuple(dict.fromkeys((*choices, *quantizers)))
    layouts = {(q.granularity, q.group_size, q.contraction_axis) for q in members}
    if len(layouts) > 1:
        raise ValueError(f"the layers of one stack need one layout; got {sorted(layouts)}")
    return Mixed(members, tuple(members.index(q) for q in quantizers))


def quantizer_of_layer(quantizer: Quantizer | Mixed | None, index: int) -> Quantizer | None:
    """The quantizer of one layer of a stack; any other than a `Mixed` is that of all layers."""
    if isinstance(quantizer, Mixed):
        return quantizer.members[quantizer.layers[index]]
    return quantizer


def settle(quantizer: Quantizer | Mixed | None, scale: Any) -> tuple[Any, Any]:
    """(quantizer, scale) with the widths that a concrete scale has now fixed in the quantizer.

    A stack with one width has a plain quantizer afterwards. Others than `Mixed` come back as they
    are.

    Raises:
      ValueError: an index that no member has.
    """
    if not isinstance(quantizer, Mixed):
        return quantizer, scale
    layers = tuple(int(i) for i in np.rint(np.asarray(scale.index, np.float64)).reshape(-1))
    if not all(0 <= i < len(quantizer.members) for i in layers):
        raise ValueError(f"indices of quantizers must be in [0, {len(quantizer.members)})")
    if len(set(layers)) == 1:
        return quantizer.members[layers[0]], scale.scale
    return quantizer._replace(layers=layers), scale
