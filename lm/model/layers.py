"""The parts of a Transformer block: norms, attention and the MLP.

B batch, T length, D width, N heads, K key-value heads, H head width, M channels of all heads,
F MLP width. Weight matrices are [in, out].
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.model import rotary, xla_cpu
from lm.model.adapters import adapter, is_adapted
from lm.model.attention import attend, attention_share
from lm.model.config import ModelConfig
from lm.model.interface import CacheQuantizer
from lm.model.packed_matrix import is_packed
from lm.model.products import plain_product

# Name of the scale of the keys among the scales of an `Attention`.
KEY_SCALE = "key_cache"


class Norm(nn.Module):
    """RMSNorm x / rms(x) * scale, or LayerNorm (x - mean) / std * scale + bias; in float32.

    What is stored of the scale is `scale - model.norm_offset`. `kind` is that of the config, but
    for queries and keys, which have an RMSNorm in every model, without the bias that
    `model.norm_bias` adds to the others.
    """

    config: ModelConfig
    kind: str = ""

    @nn.compact
    def __call__(self, x):
        c, kind = self.config, self.kind or self.config.norm
        y = x.astype(jnp.float32)
        if kind == "layernorm":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + c.norm_epsilon)
        scale = _vector(self, "scale", x.shape[-1], "norm", 1 - c.norm_offset)
        y *= scale + c.norm_offset if c.norm_offset else scale
        if kind == "layernorm" or (c.norm_bias and not self.kind):
            y += _vector(self, "bias", x.shape[-1], "norm")
        return y.astype(x.dtype)


def _vector(module: nn.Module, name: str, size: int, axis: str, value: float = 0.0):
    """A parameter [size] of equal entries, as it is stored."""
    init = nn.with_logical_partitioning(nn.initializers.constant(value), (axis,))
    return module.param(name, init, (size,), jnp.dtype(module.config.param_dtype))


def matrix(module: nn.Module, name: str, shape: tuple, axes: tuple, scale: float = 1.0):
    """A weight [in, out] that starts as N(0, scale^2 / in), as it is stored: perhaps packed."""
    c = module.config
    if is_packed(stored := module.get_variable("params", name)):
        return stored
    init = nn.with_logical_partitioning(nn.initializers.normal(scale * shape[0] ** -0.5), axes)
    return module.param(name, init, shape, jnp.dtype(c.param_dtype))


def _linear(
    module: nn.Module,
    name: str,
    x_BTD: jax.Array,
    shape: tuple,
    axes: tuple,
    scale: float = 1.0,
    bias: bool = False,
):
    """The `product` of x and the weight `name` of a layer's module, plus a bias NAME_bias."""
    w_DF = matrix(module, name, shape, axes, scale)
    stored = module.get_variable("scales", name, ())
    path = f"layers/{module.name}/{name}"
    y_BTF = module.product(path, x_BTD, w_DF, stored)
    if is_adapted(module.config, path):
        y_BTF = y_BTF + adapter(module, name, x_BTD, shape, axes)
    if not bias:
        return y_BTF
    axis = "norm" if axes[-1] == "embed" else axes[-1]
    return y_BTF + _vector(module, f"{name}_bias", shape[-1], axis).astype(y_BTF.dtype)


def _heads(module: nn.Module, name: str, x_BTD: jax.Array, count: int, axis: str) -> jax.Array:
    """A projection of x to heads, [B, count, T, H], by a weight of `module`."""
    c = module.config
    shape = (x_BTD.shape[-1], count * c.head_width)
    bias = c.attention_bias != "none"
    y_BTM = _linear(module, name, x_BTD, shape, ("embed", axis), bias=bias)
    if c.qk_norm and c.qk_norm_scope == "all" and name != "value":
        y_BTM = Norm(c, "rmsnorm", name=f"{name}_norm")(y_BTM)
    y_BTNH = y_BTM.reshape(*x_BTD.shape[:2], count, c.head_width)
    y_BTNH = nn.with_logical_constraint(y_BTNH, ("batch", "length", axis, None))
    return jnp.swapaxes(y_BTNH, 1, 2)


def _queries_and_keys(module: nn.Module, x_BTD, angles):
    """Queries [B, N, T, H] and keys [B, K, T, H], normed and rotated, by weights of `module`."""
    c = module.config
    query_BNTH = _heads(module, "query", x_BTD, c.heads, "heads")
    key_BKTH = _heads(module, "key", x_BTD, c.kv_heads, "kv_heads")
    if c.qk_norm and c.qk_norm_scope == "head":
        query_BNTH = Norm(c, "rmsnorm", name="query_norm")(query_BNTH)
        key_BKTH = Norm(c, "rmsnorm", name="key_norm")(key_BKTH)
    if angles is None:
        return query_BNTH, key_BKTH
    return rotary.rotate(query_BNTH, *angles), rotary.rotate(key_BKTH, *angles)


def _key_scale(module: nn.Module):
    """The scale of the layer's keys, [K, 1, H], for a `CacheQuantizer`; () where there is none."""
    return module.get_variable("scales", KEY_SCALE, ())


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and optional norms on queries and keys.

    With a `quantizer` it attends to keys and values on their grids, which in decoding are stored as
    codes; any implementation of attention takes them, for it gets floats.
    """

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product
    quantizer: CacheQuantizer | None = None

    @nn.compact
    def __call__(self, x_BTD, place, segment_ids_BT, blocks_BT, layer_cache):
        c = self.config
        query_BNTH, key_BKTH = _queries_and_keys(self, x_BTD, place.angles)
        value_BKTH = _heads(self, "value", x_BTD, c.kv_heads, "kv_heads")

        key_segments, offset = segment_ids_BT, 0
        if layer_cache is not None:
            key_segments, offset = layer_cache.segment_ids_BS, layer_cache.length
        key_BKTH, value_BKTH, arrays = self._remember(key_BKTH, value_BKTH, layer_cache)
        out_BNTH = attend(
            query_BNTH,
            key_BKTH,
            value_BKTH,
            segment_ids_BT,
            key_segments,
            offset=offset,
            blocks_BT=blocks_BT,
            window=place.window,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
            implementation=c.attention,
        )
        shape, axes = (c.heads * c.head_width, c.width), ("heads", "embed")
        out_BTM = jnp.swapaxes(out_BNTH, 1, 2).reshape(*x_BTD.shape[:2], shape[0])
        bias = c.attention_bias == "all"
        return _linear(self, "output", out_BTM, shape, axes, _depth_scale(c), bias), arrays

    def _remember(self, key_BKTH, value_BKTH, layer_cache):
        """The keys and values to attend to, and the cache's arrays with the new ones, if any."""
        quantizer, scale_K1H = self.quantizer, _key_scale(self)
        if layer_cache is None and quantizer is None:
            return key_BKTH, value_BKTH, None
        if layer_cache is None:
            return quantizer.keys(key_BKTH, scale_K1H), quantizer.values(value_BKTH), None
        new = (key_BKTH, value_BKTH)
        if quantizer is not None:
            new = quantizer.store(key_BKTH, value_BKTH, scale_K1H)
        arrays = layer_cache.write(new)
        stored = layer_cache.read(arrays)
        if quantizer is not None:
            stored = quantizer.read(stored, scale_K1H, key_BKTH.dtype)
        return *stored, arrays


class AttentionShare(nn.Module):
    """`attention_share` of an `Attention`, with its variables."""

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product
    quantizer: CacheQuantizer | None = None

    @nn.compact
    def __call__(self, x_BTD, place, segment_ids_BT, to_BT):
        c = self.config
        query_BNTH, key_BKTH = _queries_and_keys(self, x_BTD, place.angles)
        if self.quantizer is not None:
            key_BKTH = self.quantizer.keys(key_BKTH, _key_scale(self))
        return attention_share(
            query_BNTH,
            key_BKTH,
            segment_ids_BT,
            to_BT,
            window=place.window,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
        )


class MLP(nn.Module):
    """down(f(up x)) or, gated, down(f(gate x) * up x), with the f of `model.activation`.

    gelu (tanh form), gelu_exact and relu2, the squared ReLU, are not gated; swiglu is gated with
    SiLU, geglu with the tanh form of GELU.
    """

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        shape, axes = (c.width, c.mlp_width), ("embed", "mlp")
        y_BTF = _linear(self, "up", x_BTD, shape, axes, bias=c.mlp_bias)
        y_BTF = nn.with_logical_constraint(y_BTF, ("batch", "length", "mlp"))
        if c.activation in GATES:
            gate_BTF = _linear(self, "gate", x_BTD, shape, axes, bias=c.mlp_bias)
            y_BTF *= GATES[c.activation](gate_BTF)
        else:
            y_BTF = ACTIVATIONS[c.activation](y_BTF)
        return _linear(self, "down", y_BTF, shape[::-1], axes[::-1], _depth_scale(c), c.mlp_bias)


ACTIVATIONS = {
    "gelu": xla_cpu.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
GATES = {"swiglu": jax.nn.silu, "geglu": xla_cpu.gelu}


def _depth_scale(config: ModelConfig) -> float:
    """Keeps the residual stream's variance at initialisation independent of depth."""
    return (2 * config.layers) ** -0.5
