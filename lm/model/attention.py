"""Causal attention inside segments, behind one function.

B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head width.
"""

import jax
import jax.numpy as jnp

from lm.errors import InputError
from lm.model import splash
from lm.model.platform import platform
from lm.model.xla_cpu import is_plain

# Large enough to vanish in the softmax, small enough to stay finite in float32: a row of padding
# sees itself only, so no row is ever fully masked.
_MASKED = -1e30

# Id of the last block of a document, which sees all of it.
LAST_BLOCK = -1

# Queries of one block, and blocks at most: the program grows with their number.
_BLOCK = 64
_MAX_BLOCKS = 8


@jax.named_scope("attend")
def attend(
    query_BNTH: jax.Array,
    key_BKSH: jax.Array,
    value_BKSH: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    *,
    offset: jax.Array | int = 0,
    blocks_BT: jax.Array | None = None,
    window: jax.Array | int | None = None,
    scale: float = 0.0,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(scale q k^T + mask) v, returned as [B, N, T, H].

    Query t stands at index `offset + t` of the keys and sees key s if s <= offset + t and both lie
    in the same segment, and with blocks in the same block or the query in a last one.
    Grouped-query attention when K < N.

    Args:
      query_BNTH, key_BKSH, value_BKSH: heads before length, the order in which the products need
        no transposes.
      query_segments_BT, key_segments_BS: int32; tokens of different segments do not meet.
      offset: index of the first query among the keys; must be 0 when T = S.
      blocks_BT: int32, of queries and keys (T = S); see `visible`. None is no blocks.
      window: tokens that a query sees at most, itself and those before it; None is all.
      scale: of the products; 0 is 1 / sqrt(H).
      softcap: products x become softcap * tanh(x / softcap); 0 is off. With one, "einsum" only.
      implementation: "einsum"; "xla" or "cudnn" through `jax.nn.dot_product_attention`; "splash",
        a kernel for TPUs, and "einsum" for what it cannot have, such as decoding; "auto" is "cudnn"
        for half precision on GPU, "splash" on TPU where it can be, and "einsum" elsewhere and
        with `model.plain_autodiff`.

    Raises:
      InputError: "splash" with blocks.
    """
    if implementation == "splash" and blocks_BT is not None:
        raise InputError(
            "model.attention=splash has no blocks of tokens, which the objective asks for; "
            "valid: auto, einsum"
        )
    plain = window is None and not scale and not softcap
    if implementation == "auto":
        implementation = _best(query_BNTH, key_BKSH, plain and blocks_BT is None, bool(softcap))
    if implementation == "splash" and plain and _can_splash(query_BNTH, key_BKSH):
        return splash.splash_attention(query_BNTH, key_BKSH, value_BKSH, query_segments_BT)
    if implementation in ("einsum", "splash"):
        return _einsum_attention(
            query_BNTH,
            key_BKSH,
            value_BKSH,
            query_segments_BT,
            key_segments_BS,
            offset,
            blocks_BT,
            window,
            scale,
            softcap,
        )
    mask_BTS = visible(query_segments_BT, key_segments_BS, offset, blocks_BT, blocks_BT, window)
    out_BTNH = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query_BNTH, key_BKSH, value_BKSH)),
        mask=mask_BTS[:, None],
        scale=scale or None,
        implementation=implementation,
    )
    return jnp.swapaxes(out_BTNH, 1, 2)


def _best(query_BNTH, key_BKSH, plain: bool, softcap: bool) -> str:
    """What "auto" means for these arrays, on the devices of the mesh or else the default ones.

    `plain` is without blocks, a window, a scale of its own and a soft-cap.
    """
    if is_plain():
        return "einsum"
    half = query_BNTH.dtype in (jnp.bfloat16, jnp.float16)
    if platform() == "gpu":
        return "cudnn" if half and not softcap else "einsum"
    if platform() == "tpu" and plain and _can_splash(query_BNTH, key_BKSH):
        return "splash"
    return "einsum"


def _can_splash(query_BNTH, key_BKSH) -> bool:
    b, n, t, h = query_BNTH.shape
    k, s = key_BKSH.shape[1:3]
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    rows = mesh.get("data", 1) * mesh.get("fsdp", 1)
    return t == s and b % rows == 0 and not splash.refusal(t, n, k, h, mesh)


def visible(
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    offset: jax.Array | int,
    query_blocks_BT: jax.Array | None = None,
    key_blocks_BS: jax.Array | None = None,
    window: jax.Array | int | None = None,
) -> jax.Array:
    """Which keys a query sees, [B, T, S] bool: not later, of its own segment, with blocks of its
    own block or from a last one, and with a window of its last tokens.
    """
    queries_T1 = offset + jnp.arange(query_segments_BT.shape[1])[:, None]
    keys_1S = jnp.arange(key_segments_BS.shape[1])[None, :]
    causal_TS = queries_T1 >= keys_1S
    if window is not None:
        causal_TS &= queries_T1 - keys_1S < window
    seen_BTS = causal_TS[None] & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])
    if query_blocks_BT is None:
        return seen_BTS
    blocks_BT1 = query_blocks_BT[:, :, None]
    return seen_BTS & ((blocks_BT1 == key_blocks_BS[:, None, :]) | (blocks_BT1 == LAST_BLOCK))


def _einsum_attention(
    query_BNTH,
    key_BKSH,
    value_BKSH,
    query_segments,
    key_segments,
    offset,
    blocks_BT,
    window,
    scale,
    softcap,
):
    t, s = query_BNTH.shape[2], key_BKSH.shape[2]
    if t != s:  # decoding
        mask_BTS = visible(query_segments, key_segments, offset, window=window)
        return _attend_block(query_BNTH, key_BKSH, value_BKSH, mask_BTS, scale, softcap)
    # A block of queries needs no keys after its last one: about half of the full square.
    blocks = []
    for start, end in _query_blocks(t):
        ids = (None, None) if blocks_BT is None else (blocks_BT[:, start:end], blocks_BT[:, :end])
        mask_BTS = visible(query_segments[:, start:end], key_segments[:, :end], start, *ids, window)
        blocks.append(
            _attend_block(
                query_BNTH[:, :, start:end],
                key_BKSH[:, :, :end],
                value_BKSH[:, :, :end],
                mask_BTS,
                scale,
                softcap,
            )
        )
    return jnp.concatenate(blocks, axis=2)


def attention_share(
    query_BNTH: jax.Array,
    key_BKTH: jax.Array,
    segments_BT: jax.Array,
    to_BT: jax.Array,
    *,
    window: jax.Array | int | None = None,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> jax.Array:
    """Of the attention of each position, the share that goes to marked ones: float32 [B, T].

      share_t = 1/N sum_n sum_s p_nts to_s,  p = softmax(scale q k^T + mask)

    One block of queries has its probabilities at a time; there is no [B, N, T, T] array.

    Args:
      query_BNTH, key_BKTH: heads, as `attend` takes them.
      segments_BT: int32; who sees whom.
      to_BT: bool, the marked positions.
      window, scale, softcap: as `attend`.
    """
    shares = []
    for start, end in _query_blocks(query_BNTH.shape[2]):
        mask_BTS = visible(segments_BT[:, start:end], segments_BT[:, :end], start, window=window)
        exp_BKMS = _exponentials(
            query_BNTH[:, :, start:end], key_BKTH[:, :, :end], mask_BTS, scale, softcap
        )
        marked_BKM = jnp.where(to_BT[:, None, None, :end], exp_BKMS, 0.0).sum(-1)
        share_BKM = marked_BKM / exp_BKMS.sum(-1)
        heads_BNT = share_BKM.reshape(*query_BNTH.shape[:2], end - start)
        shares.append(heads_BNT.mean(1))
    return jnp.concatenate(shares, axis=1)


def _attend_block(query_BNTH, key_BKSH, value_BKSH, mask_BTS, scale, softcap):
    # Normalising the output instead of the probabilities saves passes over the largest array.
    exp_BKMS = _exponentials(query_BNTH, key_BKSH, mask_BTS, scale, softcap)
    out_BKMH = jnp.einsum("bkms,bksh->bkmh", exp_BKMS.astype(value_BKSH.dtype), value_BKSH)
    out_BKMH /= exp_BKMS.sum(axis=-1, keepdims=True).astype(value_BKSH.dtype)
    return out_BKMH.reshape(query_BNTH.shape)


def _exponentials(query_BNTH, key_BKSH, mask_BTS, scale, softcap):
    """The softmax before its division, M = G T: float32 [B, K, M, S], at most 1."""
    b, n, t, h = query_BNTH.shape
    k, s = key_BKSH.shape[1:3]
    # The queries of one group stand below each other: one product with their shared keys.
    query_BKMH = (query_BNTH * (scale or h**-0.5)).reshape(b, k, (n // k) * t, h)
    logits_BKMS = jnp.einsum(
        "bkmh,bksh->bkms", query_BKMH, key_BKSH, preferred_element_type=jnp.float32
    )
    if softcap:
        logits_BKMS = softcap * jnp.tanh(logits_BKMS / softcap)
    # Added, not selected, so that nothing is selected in the backward pass.
    bias_BGTS = jnp.broadcast_to(jnp.where(mask_BTS, 0.0, _MASKED)[:, None], (b, n // k, t, s))
    logits_BKMS += bias_BGTS.reshape(b, 1, -1, s)
    max_BKM1 = jax.lax.stop_gradient(logits_BKMS.max(axis=-1, keepdims=True))
    return jnp.exp(logits_BKMS - max_BKM1)


def _query_blocks(length):
    """(start, end) of each block of queries."""
    block = max(_BLOCK, -(-length // _MAX_BLOCKS))
    return [(start, min(start + block, length)) for start in range(0, length, block)]
