"""Causal attention inside segments by the Pallas kernel for TPUs, with and without a mesh.

B batch, T length, N query heads, K key-value heads, H head width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    if length % _TILES[-1]:
        return f"data.sequence_length={length} is not a multiple of {_TILES[-1]}"
    if head_width % (_LANES // 2):
        return f"model.width / model.heads = {head_width} is not a multiple of {_LANES // 2}"
    if mesh.get("sequence", 1) > 1:
        return f"mesh.sequence={mesh['sequence']} cuts the keys that a query needs; valid: 1"
    for key, count in (("heads", heads), ("kv_heads", kv_heads)):
        if count % mesh.get("tensor", 1):
            return f"model.{key}={count} is not divisible by mesh.tensor={mesh['tensor']}"
    return ""


def splash_attention(
    query_BNTH: jax.Array,
    key_BKTH: jax.Array,
    value_BKTH: jax.Array,
    segments_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, [B, N, T, H], without an array of T x T.

    On a mesh every device computes its own rows and heads, by `jax.shard_map`: XLA cannot partition
    a kernel.

    Args:
      query_BNTH, key_BKTH, value_BKTH: heads; N is a multiple of K.
      segments_BT: int32; tokens of different segments do not see each other.
      interpret: run the kernel as JAX operations, for tests on CPU.

    Returns:
      An array like the queries, in their dtype.
    """
    attend = functools.partial(_attend, interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return attend(query_BNTH, key_BKTH, value_BKTH, segments_BT)
    queries, keys, rows = (
        nn.logical_to_mesh_axes(names)
        for names in (("batch", "heads"), ("batch", "kv_heads"), ("batch",))
    )
    # The kernel does not say along which axes its results vary.
    return jax.shard_map(
        attend, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False
    )(query_BNTH, key_BKTH, value_BKTH, segments_BT)


def _attend(query_BNTH, key_BKTH, value_BKTH, segments_BT, interpret):
    # Imported here: an experimental module may move, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    _, n, t, h = query_BNTH.shape
    tile = next(size for size in _TILES if t % size == 0)
    sizes = kernels.BlockSizes(*8 * (tile,))
    mask = kernels.MultiHeadMask([kernels.CausalMask((t, t))] * n)
    kernel = kernels.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def row(query_NTH, key_KTH, value_KTH, segments_T):
        segments = kernels.SegmentIds(segments_T, segments_T)
        return kernel(query_NTH, key_KTH, value_KTH, segments)

    scaled_BNTH = query_BNTH * jnp.asarray(h**-0.5, query_BNTH.dtype)
    return jax.vmap(row)(scaled_BNTH, key_BKTH, value_BKTH, segments_BT)
