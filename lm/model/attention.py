"""Causal attention inside segments, behind one function.

B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head width.
"""

import jax
import jax.numpy as jnp

# Large enough to vanish in the softmax, small enough to stay finite in float32: a row of padding
# sees itself only, so no row is ever fully masked.
_MASKED = -1e30


def attend(
    query_BNTH: jax.Array,
    key_BKSH: jax.Array,
    value_BKSH: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    *,
    offset: jax.Array | int = 0,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, returned as [B, N, T, H].

    Query t stands at index `offset + t` of the keys and sees key s if s <= offset + t and both lie
    in the same segment. Grouped-query attention when K < N.

    Args:
      query_BNTH, key_BKSH, value_BKSH: heads before length: on CPU products in this order take
        0.9 x the time of [B, T, N, H] and no transposes.
      query_segments_BT, key_segments_BS: int32; tokens of different segments do not meet.
      offset: index of the first query among the keys; not 0 when decoding with a cache.
      implementation: "einsum"; "xla" or "cudnn" through `jax.nn.dot_product_attention`; "auto" is
        "cudnn" for half precision on GPU and "einsum" elsewhere.
    """
    if implementation == "auto":
        half = query_BNTH.dtype in (jnp.bfloat16, jnp.float16)
        implementation = "cudnn" if half and jax.default_backend() == "gpu" else "einsum"
    mask_BTS = visible(query_segments_BT, key_segments_BS, offset)
    if implementation == "einsum":
        return _einsum_attention(query_BNTH, key_BKSH, value_BKSH, mask_BTS)
    out_BTNH = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query_BNTH, key_BKSH, value_BKSH)),
        mask=mask_BTS[:, None],
        implementation=implementation,
    )
    return jnp.swapaxes(out_BTNH, 1, 2)


def visible(
    query_segments_BT: jax.Array, key_segments_BS: jax.Array, offset: jax.Array | int
) -> jax.Array:
    """Which keys a query sees, [B, T, S] bool: not later, and of its own segment."""
    queries_T1 = offset + jnp.arange(query_segments_BT.shape[1])[:, None]
    causal_TS = queries_T1 >= jnp.arange(key_segments_BS.shape[1])[None, :]
    return causal_TS[None] & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])


def _einsum_attention(query_BNTH, key_BKSH, value_BKSH, mask_BTS):
    b, n, t, h = query_BNTH.shape
    k, s = key_BKSH.shape[1:3]
    # The queries of one group stand below each other: one product with their shared keys.
    query_BKMH = (query_BNTH * h**-0.5).reshape(b, k, (n // k) * t, h)
    logits_BKMS = jnp.einsum(
        "bkmh,bksh->bkms", query_BKMH, key_BKSH, preferred_element_type=jnp.float32
    )
    logits_BKGTS = logits_BKMS.reshape(b, k, n // k, t, s)
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, _MASKED)
    probs_BKMS = jax.nn.softmax(logits_BKGTS).reshape(b, k, (n // k) * t, s)
    out_BKMH = jnp.einsum("bkms,bksh->bkmh", probs_BKMS.astype(value_BKSH.dtype), value_BKSH)
    return out_BKMH.reshape(b, n, t, h)
