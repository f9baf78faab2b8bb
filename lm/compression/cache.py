"""Keys and values of attention in few bits: while training, after it, and as decoding keeps them.

A cache is written token by token and never again, so no number in it may depend on a later token:

    keys      k_q = s rint(clip(k / s, -2^(b-1), 2^(b-1) - 1)), one fixed step s for each layer, kv
              head and channel (`objectives.quantization.lsq`, the step being learned in training)
    values    v_q = s rint(v / s), s = max |v| / (2^(b-1) - 1) over the channels of one kv head of
              one token (`objectives.quantization.absmax`, read from the token itself)

That keys have outliers in fixed channels and values do not, so that keys are to be quantized per
channel and values per token, is from KIVI (arXiv 2402.02750) and KVQuant (arXiv 2401.18079), as we
know them from memory. KIVI takes asymmetric scales over groups of tokens, and keeps the tokens of
an unfinished group in floats; a group in the middle of a text would then differ between a pass over
the text and decoding. A fixed symmetric step has no groups, and the same numbers in both: ours.

Keys are quantized after the rotary embedding, as the cache holds them. KVQuant quantizes them
before it, where outliers stay in their channels; decoding would then have to rotate the whole cache
for every token. That form is left out.

B rows, T tokens, L layers, K key-value heads, S tokens of a cache, H head width.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import InputError
from lm.model.interface import CacheQuantizer, Model
from lm.model.parameters import LAYERS
from lm.model.products import plain_product
from lm.model.transformer import make_model
from lm.parallel.in_turn import in_turn
from lm.parallel.mesh import to_host
from objectives.quantization import Grid, absmax, lsq

# `quantization.cache` -> bits of a key or a value; 0 leaves them.
CACHES = {"none": 0, "int8": 8, "int4": 4}

# Name of the steps of the keys, [L, K, 1, H], beside the scales of the parameters.
KEYS = "cache"

# Rows and tokens of the text that the first steps are read from.
_ROWS, _LENGTH = 4, 128


def make_cache_quantizer(bits: int, head_width: int) -> CacheQuantizer:
    """Keys and values of `bits` bits.

    Eight bits are stored as int8, the code times the step being the number. Two codes of four bits
    share a byte of uint8: channel h is in its low half, channel h + H/2 in its high one, each 8
    more than the signed code. Scales of values are float32.

    Args:
      bits: 4 or 8.
      head_width: H.

    Raises:
      InputError: 4 bits and an odd head width.
    """
    if bits == 4 and head_width % 2:
        raise InputError(
            f"quantization.cache=int4 puts two channels in a byte, and a head has {head_width}; "
            "valid: an even model.head_width, or quantization.cache=int8"
        )
    keys, values = lsq(bits=bits), absmax(bits=bits, contraction_axis=-1)
    to_bytes, from_bytes = (_to_int8, _from_int8) if bits == 8 else (_to_nibbles, _from_nibbles)

    def empty(shape):
        *others, width = shape
        keys, values = (
            jnp.zeros((*others, width * bits // 8), jnp.int8 if bits == 8 else jnp.uint8)
            for _ in range(2)
        )
        return keys, values, jnp.zeros((*others, 1), jnp.float32)

    def store(key_BKTH, value_BKTH, scale_K1H):
        of_key, of_value = keys.grid(key_BKTH, scale_K1H), values.grid(value_BKTH, ())
        codes = keys.encode(key_BKTH, of_key), values.encode(value_BKTH, of_value)
        return *map(to_bytes, codes), of_value.scale

    def read(stored, scale_K1H, dtype):
        key_codes, value_codes, value_scales = stored
        of_key = keys.grid((), scale_K1H)
        key_BKSH = keys.decode(from_bytes(key_codes), of_key)
        value_BKSH = values.decode(from_bytes(value_codes), Grid(value_scales))
        return key_BKSH.astype(dtype), value_BKSH.astype(dtype)

    return CacheQuantizer(
        keys=keys.quantize,
        values=lambda value_BKTH: values.quantize(value_BKTH, ()),
        empty=empty,
        store=store,
        read=read,
    )


def _to_int8(codes):
    """Codes of 0 to 255 as the signed numbers 128 below."""
    return jax.lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)


def _from_int8(stored):
    return jax.lax.bitcast_convert_type(stored, jnp.uint8) ^ jnp.uint8(128)


def _to_nibbles(codes):
    low, high = jnp.split(codes, 2, axis=-1)
    return low | (high << 4)


def _from_nibbles(stored):
    return jnp.concatenate([stored & jnp.uint8(15), stored >> 4], axis=-1)


def calibrate_cache(
    model: Model,
    params: Any,
    batches: Iterable[dict[str, jax.Array]],
    *,
    bits: int = 8,
    product: Callable[..., jax.Array] = plain_product,
) -> jax.Array:
    """Steps of the keys from text: max |k| / (2^(bits-1) - 1), float32 [L, K, 1, H].

    The maximum is over all tokens of the batches but padding (segment 0), of keys as the model has
    them without a quantized cache. One batch is in memory at a time.

    Args:
      model: of `params`.
      params: the parameters, on their grids if they are to be quantized.
      batches: at least one, with "tokens", "positions" and "segment_ids" [B, T].
      bits: of the cache, 4 or 8.
      product: of the layers, where their inputs are quantized; see `LayerProducts`.

    Raises:
      InputError: no batch, or keys that are not finite.
    """
    found = list(in_turn(_largest_keys(model, product, params, _read(batch)) for batch in batches))
    if not found:
        raise InputError("the steps of a quantized cache need at least one batch of text")
    largest_LKH = functools.reduce(jnp.maximum, found)
    if not to_host(jnp.isfinite(largest_LKH).all()):
        raise InputError("keys of this model are not finite on the calibration text")
    return _steps(largest_LKH, bits)


def first_key_scales(model: Model, params: Any, bits: int) -> jax.Array:
    """Steps of the keys from the parameters alone: those of `calibrate_cache` on random tokens.

    The tokens are drawn uniformly from the vocabulary, and always the same. Ours: the quantized
    phase of a run has to begin with some steps before it has seen text, and training goes on from
    there.
    """
    c = model.config
    length = min(_LENGTH, c.max_positions) if c.positions == "learned" else _LENGTH
    tokens_BT = jax.random.randint(jax.random.key(0), (_ROWS, length), 0, c.vocab_size)
    positions_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)
    # Few rows, which need not be a multiple of the devices: nothing is sharded.
    alone = make_model(c)
    text = (tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    return _steps(_largest_keys(alone, plain_product, params, text), bits)


def of_parameters(scales: Any) -> Any:
    """A tree of scales without those of the cache: of the structure of the parameters."""
    return {name: part for name, part in scales.items() if name != KEYS}


def _steps(largest_LKH, bits):
    return largest_LKH[:, :, None] / (2 ** (bits - 1) - 1)


def _read(batch):
    return batch["tokens"], batch["positions"], batch["segment_ids"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _largest_keys(model, product, params, text):
    """max |k| over the tokens of a text, float32 [L, K, H]."""
    tokens_BT, positions_BT, segment_ids_BT = text
    valid_BT = segment_ids_BT > 0

    def layer(x_BTD, stacked):
        weights, index = stacked
        found = []

        def see(key_BKTH, scale):
            del scale
            size_BKTH = jnp.abs(key_BKTH.astype(jnp.float32))
            found.append(jnp.where(valid_BT[:, None, :, None], size_BKTH, 0).max((0, 2)))
            return key_BKTH

        eye = CacheQuantizer(see, lambda value_BKTH: value_BKTH, None, None, None)
        x_BTD = model.block(weights, x_BTD, positions_BT, segment_ids_BT, product, index, eye)
        return x_BTD, found[0]

    x_BTD = model.embed(params, tokens_BT, positions_BT)
    layers = (params[LAYERS], jnp.arange(model.config.layers))
    return jax.lax.scan(layer, x_BTD, layers)[1]
