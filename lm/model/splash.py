"""Causal attention inside segments by the Pallas kernel for TPUs, with and without a mesh.

B batch, T length, N query heads, K key-value heads, H head width; S devices along the length, each
with L = T / S positions of it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# Queries and keys in one tile of the kernel. The largest that divides the length is taken; with 512
# the products of a tile outweigh the work that is done once per tile.
_TILES = (512, 256, 128)

# Lanes of a TPU's registers. Heads of half that width fit as well and leave half a register unused.
_LANES = 128


def refusal(length: int, heads: int, kv_heads: int, head_width: int, mesh: dict[str, int]) -> str:
    """The reason why the kernel cannot compute these sizes on this mesh; "" if it can.

    Args:
      length: tokens in a row, T.
      heads: query heads, N.
      kv_heads: key and value heads, K.
      head_width: H.
      mesh: name of an axis -> its size.
    """
    shards = mesh.get("sequence", 1)
    if length % (shards * _TILES[-1]):
        cut = f" / mesh.sequence={shards}" * (shards > 1)
        return f"data.sequence_length={length}{cut} is not a multiple of {_TILES[-1]}"
    if head_width % (_LANES // 2):
        return f"model.width / model.heads = {head_width} is not a multiple of {_LANES // 2}"
    for key, count in (("heads", heads), ("kv_heads", kv_heads)):
        if count % mesh.get("tensor", 1):
            return f"model.{key}={count} is not divisible by mesh.tensor={mesh['tensor']}"
    return ""


def imbalance(length: int, shards: int) -> float:
    """Pairs of a query and a key that the busiest device computes, over their mean.

    1 where `balanced`; without that the last of S devices has (2 S - 1) / S times the mean.

    Args:
      length: tokens in a row, T.
      shards: devices along the length, S.
    """
    return 1.0 if shards == 1 or balanced(length, shards) else (2 * shards - 1) / shards


def balanced(length: int, shards: int) -> bool:
    """Whether devices exchange halves of their queries: each half must be a multiple of a tile."""
    return shards > 1 and length % (2 * shards * _TILES[-1]) == 0


def splash_attention(
    query_BNTH: jax.Array,
    key_BKTH: jax.Array,
    value_BKTH: jax.Array,
    segments_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, [B, N, T, H], without an array of T x T.

    On a mesh every device computes its own rows, heads and queries, by `jax.shard_map`: XLA cannot
    partition a kernel. Where the length lies on several devices, each gathers the keys and values
    of its rows and heads whole, and in the backward pass their gradients are scattered again, in
    the dtype of the keys.

    Of S devices along the length, device i has queries i L to (i + 1) L, and with them the last one
    would have nearly twice the mean work. It therefore keeps the first half of them and exchanges
    the second one with device S - 1 - i: halves 2 i and 2 (S - 1 - i) + 1 of all 2 S see 2 S - 1
    halves of keys before them whatever i is. Their outputs go back the same way.

    Args:
      query_BNTH, key_BKTH, value_BKTH: heads; N is a multiple of K.
      segments_BT: int32; tokens of different segments do not see each other.
      interpret: run the kernel as JAX operations, for tests on CPU.

    Returns:
      An array like the queries, in their dtype.
    """
    arrays = query_BNTH, key_BKTH, value_BKTH, segments_BT
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _attend(*arrays, interpret=interpret)
    if mesh.shape.get("sequence", 1) > 1:
        return _attend_sharded(*arrays, interpret=interpret)
    queries, keys, rows = (
        nn.logical_to_mesh_axes(names)
        for names in (("batch", "heads"), ("batch", "kv_heads"), ("batch",))
    )
    # The kernel does not say along which axes its results vary.
    return jax.shard_map(
        functools.partial(_attend, interpret=interpret),
        in_specs=(queries, keys, keys, rows),
        out_specs=queries,
        check_vma=False,
    )(*arrays)


def _attend(query_BNTH, key_BKTH, value_BKTH, segments_BT, interpret):
    _, n, t, _ = query_BNTH.shape
    kernel = _make_kernel(np.arange(t, dtype=np.int32), n, 1, _tile(t), interpret)
    return _run(kernel, query_BNTH, key_BKTH, value_BKTH, segments_BT, segments_BT)


def _attend_sharded(query_BNTH, key_BKTH, value_BKTH, segments_BT, interpret):
    _, n, t, _ = query_BNTH.shape
    mesh, axis = jax.sharding.get_abstract_mesh(), nn.logical_to_mesh_axes(("length",))[0]
    shards = mesh.shape[axis]
    exchanges = balanced(t, shards)
    chunk = t // shards // (1 + exchanges)
    kernel = _make_kernel(query_order(t, shards), n, shards, _tile(chunk), interpret)
    queries, keys, rows = (
        nn.logical_to_mesh_axes((*names, "length"))
        for names in (("batch", "heads"), ("batch", "kv_heads"), ("batch",))
    )

    def local(kernel, query_BNLH, key_BKLH, value_BKLH, segments_BL):
        key_BKTH, value_BKTH = _gather(key_BKLH, axis), _gather(value_BKLH, axis)
        segments_BT = jax.lax.all_gather(segments_BL, axis, axis=1, tiled=True)
        if not exchanges:
            return _run(kernel, query_BNLH, key_BKTH, value_BKTH, segments_BL, segments_BT)
        query_BNLH = _exchange(query_BNLH, axis, 2)
        segments_BL = _exchange(segments_BL, axis, 1)
        out_BNLH = _run(kernel, query_BNLH, key_BKTH, value_BKTH, segments_BL, segments_BT)
        return _exchange(out_BNLH, axis, 2)

    # What is known of the mask is cut along its queries, so that each device has its own part.
    mask = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis)))
    return jax.shard_map(
        local, in_specs=(mask, queries, keys, keys, rows), out_specs=queries, check_vma=False
    )(kernel, query_BNTH, key_BKTH, value_BKTH, segments_BT)


def query_order(length: int, shards: int) -> np.ndarray:
    """The positions of the queries that devices compute, int32 [T], those of device 0 first."""
    order = np.arange(length, dtype=np.int32)
    if balanced(length, shards):
        order = order.reshape(shards, 2, -1).copy()
        order[:, 1] = order[::-1, 1].copy()
    return order.reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x_BKLH, axis):
    """[B, K, T, H] of all devices along a mesh axis; in the backward pass a reduce-scatter."""
    return jax.lax.all_gather(x_BKLH, axis, axis=2, tiled=True)


def _scatter(axis, _, gradient_BKTH):
    # XLA for TPUs makes an all-reduce, which receives twice as much, of a reduce-scatter along any
    # dimension but the outermost.
    b, k, t, h = gradient_BKTH.shape
    shards = jax.lax.axis_size(axis)
    gradient_SBKLH = jnp.moveaxis(gradient_BKTH.reshape(b, k, shards, t // shards, h), 2, 0)
    return (jax.lax.psum_scatter(gradient_SBKLH, axis, scatter_dimension=0),)


_gather.defvjp(lambda x_BKLH, axis: (_gather(x_BKLH, axis), None), _scatter)


def _exchange(x, axis, dimension):
    """Sends the second half along a dimension to the device that is as far from the other end."""
    first, second = jnp.split(x, 2, dimension)
    last = jax.lax.axis_size(axis) - 1
    second = jax.lax.ppermute(second, axis, [(i, last - i) for i in range(last + 1)])
    return jnp.concatenate([first, second], dimension)


def _tile(length: int) -> int:
    return next(size for size in _TILES if length % size == 0)


def _make_kernel(positions_T: np.ndarray, heads: int, shards: int, tile: int, interpret: bool):
    """The kernel of queries at these positions, to be cut in as many shards, over all keys."""
    # Imported here: an experimental module may move, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    class Causal(kernels.CausalMask):
        """Of queries in this order."""

        def __init__(self):
            super().__init__((len(positions_T), len(positions_T)))
            self.q_sequence = positions_T

        def __getitem__(self, tile: Any) -> np.ndarray:
            value = _value(self.q_sequence[tile[0]], tile[1])
            return super().__getitem__(tile) if value is None else np.full((1, 1), value)

    return kernels.make_splash_mha(
        kernels.MultiHeadMask([Causal()] * heads),
        block_sizes=kernels.BlockSizes(*8 * (tile,)),
        head_shards=1,
        q_seq_shards=shards,
        interpret=interpret,
    )


def _value(positions: np.ndarray, keys: slice) -> bool | None:
    """Whether queries at ascending positions see all of these keys, or none; None if some.

    All that the kernel asks of a tile is that. Of 128k tokens there are 65,536 tiles, each asked
    for six times: their elements would take minutes.
    """
    if positions[0] >= keys.stop - 1:
        return True
    return False if positions[-1] < keys.start else None


def _run(kernel, query_BNLH, key_BKTH, value_BKTH, query_segments_BL, key_segments_BT):
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    def row(query_NLH, key_KTH, value_KTH, query_segments_L, key_segments_T):
        segments = kernels.SegmentIds(query_segments_L, key_segments_T)
        return kernel(query_NLH, key_KTH, value_KTH, segments)

    scaled_BNLH = query_BNLH * jnp.asarray(query_BNLH.shape[-1] ** -0.5, query_BNLH.dtype)
    return jax.vmap(row)(scaled_BNLH, key_BKTH, value_BKTH, query_segments_BL, key_segments_BT)
