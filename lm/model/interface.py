"""What goes into a model and what comes out: the seam between Flax and everything else.

B batch, T length, D width, V vocabulary, L layers, K key-value heads, S cache length, H head width,
U layers in one turn of the loop over layers in decoding, R = L / U turns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lm.model.config import ModelConfig
from lm.model.products import plain_product


class KVCache(NamedTuple):
    """What decoding remembers of S tokens: keys and values of every layer, and segments.

    Attributes:
      layers: for each of the U layers of a turn its keys and values, [B, K, S, H] if there is one
        turn, otherwise [R, B, K, S, H], where layer r U + u is entry r of the arrays at u.
        Quantized, they are the arrays that `CacheQuantizer.store` makes: codes of keys, codes of
        values, scales of values.
      segment_ids_BS: of the tokens, int32.
      length: tokens written so far, int32.
    """

    layers: tuple[tuple[jax.Array, ...], ...]
    segment_ids_BS: jax.Array
    length: jax.Array


class LayerCache(NamedTuple):
    """What one layer sees of a `KVCache`.

    Attributes:
      arrays: those of its place in a turn.
      turn: its entry of them, r; None where there is one turn.
      segment_ids_BS, length: of the cache; the tokens of this pass are in `segment_ids_BS` already.
    """

    arrays: tuple[jax.Array, ...]
    turn: jax.Array
    segment_ids_BS: jax.Array
    length: jax.Array

    def write(self, new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The arrays with those of this pass, each [B, K, T, H], behind what is written already."""
        start = (0, 0, self.length, 0)
        if self.turn is not None:
            start, new = (self.turn, *start), [x[None] for x in new]
        return tuple(
            jax.lax.dynamic_update_slice(array, x, start)
            for array, x in zip(self.arrays, new, strict=True)
        )

    def read(self, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The layer's own part of the arrays, each [B, K, S, H]."""
        if self.turn is None:
            return arrays
        return tuple(jax.lax.dynamic_index_in_dim(x, self.turn, keepdims=False) for x in arrays)


class Tokens(NamedTuple):
    """The input of a model: int32 arrays [B, T].

    Attributes:
      tokens: ids below the size of the vocabulary.
      positions: of each token in its document.
      segment_ids: equal for the tokens that may attend to each other.
      blocks: cut the attention further, see `attention.visible`; None in decoding, and where a
        segment attends to all of itself.
      key: random key of dropout, which there is none of without one.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    blocks: jax.Array | None = None
    key: jax.Array | None = None


class CacheQuantizer(NamedTuple):
    """How keys and values become numbers of few bits, so that quantization need not be known here.

    What attention reads is the same with a cache, read(store(key, value)), and without one,
    keys(key) and values(value). Keys are those that a cache holds: normed and rotated. A scale of
    keys is that of one layer, [K, 1, H].

    Attributes:
      keys: (keys [B, K, T, H], scale) -> the same on their grids, gradients included.
      values: (values [B, K, T, H]) -> the same on their grids, gradients included.
      empty: (shape [..., S, H] of keys and of values) -> arrays of zeros such as `store` makes.
      store: (keys, values, scale) -> (codes of keys, codes of values, scales of values).
      read: (what `store` made, scale, dtype) -> (keys, values).
    """

    keys: Callable[[jax.Array, Any], jax.Array]
    values: Callable[[jax.Array], jax.Array]
    empty: Callable[[tuple[int, ...]], tuple[jax.Array, ...]]
    store: Callable[..., tuple[jax.Array, ...]]
    read: Callable[..., tuple[jax.Array, jax.Array]]


class LayerProducts(NamedTuple):
    """How the layers multiply by their weights, so that quantization need not be known here.

    Attributes:
      product: (path such as "layers/mlp/up", input [B, T, I], weight [I, O] as it is stored, scale)
        -> [B, T, O].
      scales: a tree stacked over layers like the parameters' "layers"; `product` gets the leaf at
        the path, and () where there is none.
      cache: what keys and values go through; None leaves them.
      key_scales: of the keys of every layer, [L, K, 1, H], for `cache`.
    """

    product: Callable[..., jax.Array] = plain_product
    scales: Any = None
    cache: CacheQuantizer | None = None
    key_scales: Any = ()


PLAIN = LayerProducts()


class Outputs(NamedTuple):
    """The result of a forward pass.

    Attributes:
      hidden: states in front of the head, [B, T, D] in the compute dtype.
      aux: the taps that were asked for, by name.
      cache: with the tokens of this pass; None where none was given.
    """

    hidden: jax.Array
    aux: dict[str, jax.Array]
    cache: KVCache | None


class Model(NamedTuple):
    """Pure functions of one architecture, made by `make_model`.

    Attributes:
      config: the architecture.
      init: (key) -> parameters.
      axes: () -> a tree like the parameters, of PartitionSpecs that name each array's axes.
      apply: (parameters, Tokens, cache=None, products=PLAIN, taps=None) -> Outputs. `taps` maps a
        name of `TAPS` to its argument; a pass with a cache has none.
      head: (parameters) -> output matrix [D, V].
      embed: (parameters, tokens, positions) -> input of the first layer [B, T, D].
      block: (parameters of one layer, x [B, T, D], positions, segment_ids, product=plain_product,
        layer=0, cache=None) -> the next layer's x; `layer` is its number, `cache` a
        `CacheQuantizer` that gets no scales. `apply` is embed, every block and finish.
      finish: (parameters, output of the last layer) -> hidden [B, T, D].
    """

    config: ModelConfig
    init: Callable[[jax.Array], Any]
    axes: Callable[[], Any]
    apply: Callable[..., Outputs]
    head: Callable[[Any], jax.Array]
    embed: Callable[[Any, jax.Array, jax.Array], jax.Array]
    block: Callable[..., jax.Array]
    finish: Callable[[Any, jax.Array], jax.Array]
