"""Causal attention inside segments by the Pallas kernel for TPUs, on a mesh or without one.

B batch, T length, N query heads, K key-value heads, H head width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

# The kernel works on tiles of so many queries and keys; of larger ones, those of 512 are the
# smallest with which a tile's products outweigh what is done once a tile.
_TILES = (512, 256, 128)

# Lanes of a TPU's registers; heads of half as many fit as well, with half of each register unused.
_LANES = 128


def refusal(length: int, heads: int, kv_heads: int, head_width: int, mesh: dict[str, int]) -> str:
    """Why the kernel cannot have rows of these sizes on this mesh; "" if it can."""
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

    Under axis rules every device computes its own rows and heads: a kernel is nothing that XLA
    could cut.

    Args:
      query_BNTH, key_BKTH, value_BKTH: heads; N is a multiple of K.
      segments_BT: int32, tokens of different segments do not meet.
      interpret: run the kernel as JAX operations, for tests on CPU.
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
    # Only here: what is experimental may move, and nobody without a TPU needs it.
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
