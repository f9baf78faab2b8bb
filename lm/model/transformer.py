"""A decoder-only Transformer: pre-norm blocks, scanned over layers; returns hidden states.

B batch, T length, D width, N heads, K key-value heads, H head width, F MLP width, V vocabulary,
L layers. Weight matrices are [in, out].
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.model import embeddings, rotary, xla_cpu
from lm.model.attention import attend, attention_share
from lm.model.config import ModelConfig
from lm.model.interface import PLAIN, KVCache, Model, Outputs, Tokens
from lm.model.products import plain_product

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def make_model(config: ModelConfig, axis_rules: Sequence[tuple[str, Any]] = ()) -> Model:
    """The functions of a model; the only seam between Flax and everything else.

    Args:
      config: the architecture.
      axis_rules: pairs of an axis name and the mesh axes that it lies on, for the constraints on
        activations; without them nothing is constrained.
    """
    module = Transformer(config)

    @contextlib.contextmanager
    def scope():
        with nn.logical_axis_rules(axis_rules), xla_cpu.plain_autodiff(config.plain_autodiff):
            yield

    def boxed(key):
        tokens_BT = jnp.zeros((1, 2), jnp.int32)
        return module.init(key, Tokens(tokens_BT, tokens_BT, tokens_BT))["params"]

    def init(key):
        return nn.unbox(boxed(key))

    @functools.cache
    def axes():
        return nn.get_partition_spec(jax.eval_shape(boxed, jax.random.key(0)))

    def apply(params, inputs, cache=None, products=PLAIN, taps=None):
        variables, taps = {"params": params}, taps or {}
        if scales := _without_empty(products.scales or {}):
            variables["scales"] = {"layers": scales}
        with scope():
            hidden_BTD, new_cache, input_BTD = Transformer(config, products.product).apply(
                variables, inputs, cache, keep_input="attention_to" in taps
            )
            passed = _Pass(config, products.product, variables, inputs, input_BTD, hidden_BTD)
            aux = {name: TAPS[name](passed, argument) for name, argument in taps.items()}
        return Outputs(hidden_BTD, aux, new_cache)

    def method(function):
        def call(params, *arguments):
            with scope():
                return module.apply({"params": params}, *arguments, method=function)

        return call

    def block(params, x, positions, segment_ids, product=plain_product):
        with scope():
            (x_BTD, _), _ = Block(config, product).apply(
                {"params": params},
                (x, None),
                None,
                *rotary.rope_angles(positions, config.head_width, config.rope_base),
                segment_ids,
                None,
            )
        return x_BTD

    return Model(
        config,
        init,
        axes,
        apply,
        head=method(Transformer.head),
        embed=method(Transformer.embed),
        block=block,
        finish=method(Transformer.finish),
    )


def _without_empty(tree: Any) -> Any:
    """The dictionary without its leaves of () and without dictionaries that hold nothing else."""
    if not isinstance(tree, dict):
        return tree
    kept = {name: _without_empty(part) for name, part in tree.items()}
    return {name: part for name, part in kept.items() if jax.tree.leaves(part)}


class Norm(nn.Module):
    """RMSNorm x / rms(x) * scale, or LayerNorm (x - mean) / std * scale + bias; in float32."""

    kind: str
    param_dtype: str

    @nn.compact
    def __call__(self, x):
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
        axes, shape = ("norm",), (x.shape[-1],)
        ones = nn.with_logical_partitioning(nn.initializers.ones, axes)
        y *= self.param("scale", ones, shape, jnp.dtype(self.param_dtype))
        if self.kind == "layernorm":
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
            y += self.param("bias", zeros, shape, jnp.dtype(self.param_dtype))
        return y.astype(x.dtype)


def _matrix(module: nn.Module, name: str, shape: tuple, axes: tuple, scale: float = 1.0):
    """A weight [in, out] that starts as N(0, scale^2 / in), as it is stored."""
    c = module.config
    init = nn.with_logical_partitioning(nn.initializers.normal(scale * shape[0] ** -0.5), axes)
    return module.param(name, init, shape, jnp.dtype(c.param_dtype))


def _linear(
    module: nn.Module, name: str, x_BTD: jax.Array, shape: tuple, axes: tuple, scale: float = 1.0
):
    """The `product` of x and the weight `name` of a layer's module."""
    w_DF = _matrix(module, name, shape, axes, scale)
    stored = module.get_variable("scales", name, ())
    return module.product(f"layers/{module.name}/{name}", x_BTD, w_DF, stored)


def _heads(module: nn.Module, name: str, x_BTD: jax.Array, count: int, axis: str) -> jax.Array:
    """A projection of x to heads, [B, count, T, H], by a weight of `module`."""
    h = module.config.head_width
    y_BTM = _linear(module, name, x_BTD, (x_BTD.shape[-1], count * h), ("embed", axis))
    y_BTNH = y_BTM.reshape(*x_BTD.shape[:2], count, h)
    y_BTNH = nn.with_logical_constraint(y_BTNH, ("batch", "length", axis, None))
    return jnp.swapaxes(y_BTNH, 1, 2)


def _queries_and_keys(module: nn.Module, x_BTD, sin_BTH, cos_BTH):
    """Queries [B, N, T, H] and keys [B, K, T, H], normed and rotated, by weights of `module`."""
    c = module.config
    query_BNTH = _heads(module, "query", x_BTD, c.heads, "heads")
    key_BKTH = _heads(module, "key", x_BTD, c.kv_heads, "kv_heads")
    if c.qk_norm:
        query_BNTH = Norm("rmsnorm", c.param_dtype, name="query_norm")(query_BNTH)
        key_BKTH = Norm("rmsnorm", c.param_dtype, name="key_norm")(key_BKTH)
    angles = sin_BTH, cos_BTH
    return rotary.rotate(query_BNTH, *angles), rotary.rotate(key_BKTH, *angles)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and optional norms on queries and keys."""

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product

    @nn.compact
    def __call__(self, x_BTD, sin_BTH, cos_BTH, segment_ids_BT, layer_cache, cache, blocks_BT):
        c = self.config
        query_BNTH, key_BKTH = _queries_and_keys(self, x_BTD, sin_BTH, cos_BTH)
        value_BKTH = _heads(self, "value", x_BTD, c.kv_heads, "kv_heads")

        key_segments, offset = segment_ids_BT, 0
        if layer_cache is not None:
            key_segments, offset = cache.segment_ids_BS, cache.length
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2)
            key_BKTH = write(layer_cache[0], key_BKTH, offset)
            value_BKTH = write(layer_cache[1], value_BKTH, offset)
            layer_cache = (key_BKTH, value_BKTH)
        out_BNTH = attend(
            query_BNTH,
            key_BKTH,
            value_BKTH,
            segment_ids_BT,
            key_segments,
            offset=offset,
            blocks_BT=blocks_BT,
            implementation=c.attention,
        )
        shape, axes = (c.heads * c.head_width, c.width), ("heads", "embed")
        out_BTM = jnp.swapaxes(out_BNTH, 1, 2).reshape(*x_BTD.shape[:2], shape[0])
        return _linear(self, "output", out_BTM, shape, axes, _depth_scale(c)), layer_cache


class AttentionShare(nn.Module):
    """`attention_share` of an `Attention`, with its variables."""

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product

    @nn.compact
    def __call__(self, x_BTD, sin_BTH, cos_BTH, segment_ids_BT, to_BT):
        query_BNTH, key_BKTH = _queries_and_keys(self, x_BTD, sin_BTH, cos_BTH)
        return attention_share(query_BNTH, key_BKTH, segment_ids_BT, to_BT)


class _Pass(NamedTuple):
    """A forward pass, as a tap reads it: `input_BTD` is that of the last layer."""

    config: ModelConfig
    product: Callable[..., jax.Array]
    variables: Any
    inputs: Tokens
    input_BTD: jax.Array | None
    hidden_BTD: jax.Array


def _attention_to(passed: _Pass, to_BT: jax.Array) -> jax.Array:
    """The share of the last layer's attention that goes to the positions marked in `to`.

    Mean over heads, float32 [B, T], without blocks, a constant to gradients. It is computed again
    beside the model: its own attention may be a kernel that never holds probabilities.
    """
    c, inputs = passed.config, passed.inputs
    layer = {k: jax.tree.map(lambda x: x[-1], v["layers"]) for k, v in passed.variables.items()}
    layer, input_BTD = jax.lax.stop_gradient((layer, passed.input_BTD))
    norm = Norm(c.norm, c.param_dtype)
    y_BTD = norm.apply({"params": layer["params"]["attention_norm"]}, input_BTD)
    own = {name: tree["attention"] for name, tree in layer.items() if "attention" in tree}
    angles = rotary.rope_angles(inputs.positions, c.head_width, c.rope_base)
    # `product` finds the weights by this name.
    return AttentionShare(c, passed.product, name="attention").apply(
        own, y_BTD, *angles, inputs.segment_ids, to_BT
    )


# Name of a tap -> (forward pass, argument of the tap) -> array.
TAPS = {"attention_to": _attention_to}


class MLP(nn.Module):
    """down(f(up x)) with f = GELU (tanh form) or squared ReLU, or down(silu(gate x) * up x)."""

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        shape, axes = (c.width, c.mlp_width), ("embed", "mlp")
        y_BTF = _linear(self, "up", x_BTD, shape, axes)
        y_BTF = nn.with_logical_constraint(y_BTF, ("batch", "length", "mlp"))
        if c.activation == "swiglu":
            y_BTF *= jax.nn.silu(_linear(self, "gate", x_BTD, shape, axes))
        elif c.activation == "relu2":
            y_BTF = jnp.square(jax.nn.relu(y_BTF))
        else:
            y_BTF = xla_cpu.gelu(y_BTF)
        return _linear(self, "down", y_BTF, shape[::-1], axes[::-1], _depth_scale(c))


def _depth_scale(config: ModelConfig) -> float:
    """Keeps the residual stream's variance at initialisation independent of depth."""
    return (2 * config.layers) ** -0.5


class Block(nn.Module):
    """x + Attention(Norm x), then x + MLP(Norm x).

    What is carried from layer to layer is x, and the input of the layer before; None in place of
    that input, an empty tree, carries nothing.
    """

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product

    @nn.compact
    def __call__(self, carry, layer_cache, sin_BTH, cos_BTH, segment_ids_BT, cache, blocks_BT=None):
        c = self.config
        x_BTD, input_BTD = carry
        if input_BTD is not None:
            input_BTD = x_BTD
        norm = functools.partial(Norm, c.norm, c.param_dtype)
        y_BTD, layer_cache = Attention(c, self.product, name="attention")(
            norm(name="attention_norm")(x_BTD),
            sin_BTH,
            cos_BTH,
            segment_ids_BT,
            layer_cache,
            cache,
            blocks_BT,
        )
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + MLP(c, self.product, name="mlp")(norm(name="mlp_norm")(x_BTD))
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", None))
        return (x_BTD, input_BTD), layer_cache


class Transformer(nn.Module):
    """Embedding, L scanned blocks, final norm. Hidden states out; the objective applies the head.

    The variables are `params`: {embedding, layers (stacked on a leading axis L), final_norm, head},
    less what the interface or the head does not have, and the `scales` that `product` is given. The
    decode cache is an argument and a result.
    """

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product

    def setup(self):
        c = self.config
        self.embedding = embeddings.INTERFACES[c.embedding](c)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "scales": 0},
            split_rngs={"params": True},
            in_axes=(0, *5 * (nn.broadcast,)),
            length=c.layers,
            unroll=c.unrolled,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.product)
        self.final_norm = Norm(c.norm, c.param_dtype)
        if c.own_head:
            self.output = Head(c, name="head")

    def __call__(self, inputs: Tokens, cache=None, keep_input=False):
        """Hidden states, the cache, and with `keep_input` the input of the last block."""
        c = self.config
        tokens_BT, positions_BT, segment_ids_BT, blocks_BT = inputs
        x_BTD = self.embed(tokens_BT)
        layer_cache = None
        if cache is not None:
            segments_BS = jax.lax.dynamic_update_slice_in_dim(
                cache.segment_ids_BS, segment_ids_BT, cache.length, axis=1
            )
            cache = cache._replace(segment_ids_BS=segments_BS)
            layer_cache = (cache.keys_LBKSH, cache.values_LBKSH)
        carry = (x_BTD, x_BTD if keep_input else None)
        angles = rotary.rope_angles(positions_BT, c.head_width, c.rope_base)
        (x_BTD, input_BTD), layer_cache = self.layers(
            carry, layer_cache, *angles, segment_ids_BT, cache, blocks_BT
        )
        if cache is not None:
            cache = KVCache(*layer_cache, cache.segment_ids_BS, cache.length + tokens_BT.shape[1])
        if self.is_initializing() and c.own_head:
            self.output()
        return self.finish(x_BTD), cache, input_BTD

    def embed(self, tokens_BT):
        return nn.with_logical_constraint(self.embedding(tokens_BT), ("batch", "length", None))

    def finish(self, x_BTD):
        return self.final_norm(x_BTD)

    def head(self):
        """The output matrix [D, V], in the compute dtype."""
        w_DV = self.output() if self.config.own_head else self.embedding.head()
        return w_DV.astype(self.config.dtype)


class Head(nn.Module):
    """An output matrix [D, V] of its own."""

    config: ModelConfig

    @nn.compact
    def __call__(self):
        c = self.config
        return _matrix(self, "kernel", (c.width, c.vocab_size), ("embed", "vocab")).astype(c.dtype)
