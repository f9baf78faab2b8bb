"""A decoder-only Transformer: pre-norm blocks, scanned over layers; returns hidden states.

B batch, T length, D width, N heads, K key-value heads, H head width, F MLP width, V vocabulary,
L layers. Weight matrices are [in, out].
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.errors import InputError
from lm.model import embeddings, xla_cpu
from lm.model.config import ModelConfig
from lm.model.interface import (
    PLAIN,
    CacheQuantizer,
    KVCache,
    LayerCache,
    LayerProducts,
    Model,
    Outputs,
    Tokens,
)
from lm.model.layers import KEY_SCALE, MLP, Attention, Norm, matrix
from lm.model.places import make_places
from lm.model.products import plain_product
from lm.model.taps import TAPS, ForwardPass


def _save_products(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """Whether the backward pass gets the result stored: of products with weights.

    Those of few inputs, such as the second product of an adapter, are cheap to compute again.
    """
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *operands, **parameters
    ):
        return False
    (contracted, _), _ = parameters["dimension_numbers"]
    inputs = math.prod(operands[0].shape[axis] for axis in contracted)
    return _FEW * inputs >= operands[1].size // inputs


# A product has few inputs where the outputs are more than this times as many.
_FEW = 8

REMAT_POLICIES = {"full": None, "dots": _save_products}


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
        if scales := _scales(products):
            variables["scales"] = {"layers": scales}
        quantized = Transformer(config, products.product, products.cache)
        if cache is not None and taps:
            raise ValueError(f"a pass with a cache has no taps: {', '.join(taps)}")
        with scope():
            if cache is not None:
                return _apply_cached(quantized, variables, inputs, cache)
            return _apply_whole(quantized, variables, inputs, products, taps)

    def method(function):
        def call(params, *arguments):
            with scope():
                return module.apply({"params": params}, *arguments, method=function)

        return call

    def block(params, x, positions, segment_ids, product=plain_product, layer=0, cache=None):
        with scope():
            places = make_places(config, positions)
            (x_BTD, _), _ = Block(config, product, cache).apply(
                {"params": params}, (x, None), places.kind(layer), places, segment_ids
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


def _apply_whole(
    module: "Transformer",
    variables: dict[str, Any],
    inputs: Tokens,
    products: LayerProducts,
    taps: Mapping[str, Any],
) -> Outputs:
    """`Model.apply` of whole rows, without a cache; `aux` holds what the taps found."""
    hidden_BTD, input_BTD = module.apply(
        variables,
        inputs._replace(key=None),
        keep_input="attention_to" in taps,
        rngs=None if inputs.key is None else {"dropout": inputs.key},
    )
    passed = ForwardPass(module.config, products, variables, inputs, input_BTD, hidden_BTD)
    aux = {name: TAPS[name](passed, argument) for name, argument in taps.items()}
    return Outputs(hidden_BTD, aux, None)


def _apply_cached(
    module: "Transformer", variables: dict[str, Any], inputs: Tokens, cache: KVCache
) -> Outputs:
    """`Model.apply` of tokens that follow those of a cache.

    The layers are a loop of R turns, U layers in each. It carries the cache and writes the new
    tokens in place: a scan that takes the cache of a layer and gives it back, as it does with what
    is differentiated, would copy all of it for every token.
    """
    c, together = module.config, len(cache.layers)
    turns = c.layers // together
    segments_BS = jax.lax.dynamic_update_slice_in_dim(
        cache.segment_ids_BS, inputs.segment_ids, cache.length, axis=1
    )
    block = Block(c, module.product, module.quantizer)
    places = make_places(c, inputs.positions)

    def turn(number, carry):  # `number` is None where there is one turn.
        (x_BTD, all_arrays), written = carry, []
        for i, arrays in enumerate(all_arrays):
            layer = i if number is None else number * together + i
            at_layer = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
            (x_BTD, _), arrays = block.apply(
                jax.tree.map(at_layer, layers),
                (x_BTD, None),
                places.kind(layer),
                places,
                inputs.segment_ids,
                layer_cache=LayerCache(arrays, number, segments_BS, cache.length),
            )
            written.append(arrays)
        return x_BTD, tuple(written)

    params = {"params": variables["params"]}
    x_BTD = module.apply(params, inputs.tokens, inputs.positions, method="embed")
    layers = {kind: tree["layers"] for kind, tree in variables.items()}
    carry = (x_BTD, _checked(cache.layers, module.quantizer))
    x_BTD, arrays = turn(None, carry) if turns == 1 else jax.lax.fori_loop(0, turns, turn, carry)
    hidden_BTD = module.apply(params, x_BTD, method="finish")
    return Outputs(
        hidden_BTD, {}, KVCache(arrays, segments_BS, cache.length + inputs.tokens.shape[1])
    )


def _checked(layers: tuple[tuple[jax.Array, ...], ...], quantizer: CacheQuantizer | None):
    """The arrays of a cache.

    Raises:
      InputError: floats for a quantized model, or codes for another one.
    """
    coded = len(layers[0]) > 2
    if coded != (quantizer is not None):
        raise InputError(
            f"the cache holds {'codes' if coded else 'floats'} and the model reads "
            f"{'floats' if coded else 'codes'}; make it by init_cache with the same quantizer"
        )
    return layers


def _scales(products: LayerProducts) -> Any:
    """The scales of all layers, those of the keys among them."""
    scales = products.scales or {}
    if products.cache is not None:
        own = {**scales.get("attention", {}), KEY_SCALE: products.key_scales}
        scales = {**scales, "attention": own}
    return _without_empty(scales)


def _without_empty(tree: Any) -> Any:
    """The dictionary without its leaves of () and without dictionaries that hold nothing else."""
    if not isinstance(tree, dict):
        return tree
    kept = {name: _without_empty(part) for name, part in tree.items()}
    return {name: part for name, part in kept.items() if jax.tree.leaves(part)}


class Block(nn.Module):
    """x + Attention(Norm x), then x + MLP(Norm x).

    That is `model.norm_placement` "before". With "after" both are x + Norm(f(x)), with "both"
    x + Norm(f(Norm x)). With `model.parallel_block` the MLP reads the x that the attention reads.

    What is carried from layer to layer is x, and the input of the layer before; None in place of
    that input, an empty tree, carries nothing. What else is returned are the arrays of a
    `LayerCache` with the keys and values of this pass; None without one.
    """

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product
    quantizer: CacheQuantizer | None = None

    @nn.compact
    def __call__(self, carry, kind, places, segment_ids_BT, blocks_BT=None, layer_cache=None):
        c = self.config
        x_BTD, input_BTD = carry
        if input_BTD is not None:
            input_BTD = x_BTD
        y_BTD, arrays = Attention(c, self.product, self.quantizer, name="attention")(
            self.norm("attention_norm", x_BTD),
            places.of_layer(kind),
            segment_ids_BT,
            blocks_BT,
            layer_cache,
        )
        y_BTD = self.norm_after("attention_norm", y_BTD)
        if not c.parallel_block:
            x_BTD = x_BTD + y_BTD
        z_BTD = MLP(c, self.product, name="mlp")(self.norm("mlp_norm", x_BTD))
        x_BTD = x_BTD + self.norm_after("mlp_norm", z_BTD)
        if c.parallel_block:
            x_BTD = x_BTD + y_BTD
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", "length", None))
        return (x_BTD, input_BTD), arrays

    def norm(self, name, x_BTD):
        """The norm in front of a sub-block, where there is one."""
        if self.config.norm_placement == "after":
            return x_BTD
        return Norm(self.config, name=name)(x_BTD)

    def norm_after(self, name, x_BTD):
        """The norm behind a sub-block, where there is one."""
        if self.config.norm_placement == "before":
            return x_BTD
        return Norm(self.config, name=f"{name}_after")(x_BTD)


class Transformer(nn.Module):
    """Embedding, L scanned blocks, final norm. Hidden states out; the objective applies the head.

    The variables are `params`: {embedding, positions, layers (stacked on a leading axis L),
    final_norm, head}, less what the interface or the head does not have, and the `scales` that
    `product` is given.
    """

    config: ModelConfig
    product: Callable[..., jax.Array] = plain_product
    quantizer: CacheQuantizer | None = None

    def setup(self):
        c = self.config
        self.embedding = embeddings.INTERFACES[c.embedding](c)
        if c.positions == "learned":
            self.positions = embeddings.LearnedPositions(c)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0, "scales": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *3 * (nn.broadcast,)),
            length=c.layers,
            unroll=c.unrolled,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.product, self.quantizer)
        self.final_norm = Norm(c)
        if c.own_head:
            self.output = Head(c, name="head")

    def __call__(self, inputs: Tokens, keep_input=False):
        """Hidden states, and with `keep_input` the input of the last block."""
        c = self.config
        tokens_BT, positions_BT, segment_ids_BT, blocks_BT, _ = inputs
        x_BTD = self.embed(tokens_BT, positions_BT)
        carry = (x_BTD, x_BTD if keep_input else None)
        places = make_places(c, positions_BT)
        (x_BTD, input_BTD), _ = self.layers(carry, places.kind_L, places, segment_ids_BT, blocks_BT)
        if self.is_initializing() and c.own_head:
            self.output()
        return self.finish(x_BTD), input_BTD

    def embed(self, tokens_BT, positions_BT):
        x_BTD = self.embedding(tokens_BT)
        if self.config.positions == "learned":
            x_BTD += self.positions(positions_BT)
        return nn.with_logical_constraint(x_BTD, ("batch", "length", None))

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
        return matrix(self, "kernel", (c.width, c.vocab_size), ("embed", "vocab")).astype(c.dtype)
