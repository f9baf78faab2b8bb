"""A trained model put on grids without further training: round to nearest, GPTQ, GPTQ with RSQ.

B rows, T tokens, D width, I inputs and O outputs of a matrix, L layers.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.compression.cache import KEYS
from lm.compression.calibration import embed, layer_at, multiply
from lm.compression.integer_grids import round_scales
from lm.compression.packed import KEY_SCALES, Coded, code_leaves
from lm.errors import InputError
from lm.model.interface import Model
from lm.model.parameters import (
    ATTENTION_OUTPUT,
    HEAD,
    HEAD_MATRIX,
    LAYERS,
    MATRICES_BY_INPUT,
    VALUE,
    layer_matrices,
    path_of,
)
from lm.model.streams import leaf_at, with_leaves
from lm.parallel.in_turn import in_turn
from objectives.quantization import calibration_hessian, gptq, init_scales, quantizer_of_layer
from objectives.quantization.gptq import GPTQ
from objectives.quantization.qat import Rules

# How often the damping is added to a Hessian before GPTQ gives up.
_MOST_DAMPINGS = 50


class PostTrained(NamedTuple):
    """A model on grids, from a function of this module.

    Attributes:
      params: the parameters, quantized leaves on their grids.
      coded: path -> codes and grid of each quantized leaf.
      losses: path -> what GPTQ reports for each matrix that it quantized, see
        `objectives.quantization.gptq.GPTQ`; float32 [L] for stacked leaves.
      key_scales: of a quantized cache, of `cache.calibrate_cache` or trained; None for none.
      unrounded: path -> float32 weights that have the codes of each matrix that GPTQ quantized,
        see `objectives.quantization.gptq.GPTQ`; empty unless they were asked for.
    """

    params: Any
    coded: dict[str, Coded]
    losses: dict[str, np.ndarray]
    key_scales: Any = None
    unrounded: Mapping[str, np.ndarray] = MappingProxyType({})

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """(path, `Coded` or array) of every leaf, for `packed.write_packed`."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            name = path_of(path)
            yield name, self.coded.get(name, leaf)
        if self.key_scales is not None:
            yield KEY_SCALES, self.key_scales


def put_on_grids(params: Any, scales: Any, rules: Rules) -> PostTrained:
    """Every quantizer applied once, with the given scales: trained ones, or of `init_scales`.

    Raises:
      InputError: weights that are not finite.
      ValueError: a leaf that no rule covers, or whose shape does not fit its quantizer.
    """
    coded = {n: c for n, c in code_leaves(params, scales, rules) if isinstance(c, Coded)}
    return PostTrained(_replace(params, coded), coded, {}, scales.get(KEYS))


def with_scales(result: PostTrained, dtype: str) -> PostTrained:
    """The same codes with scales of another type, see `integer_grids.round_scales`."""
    if dtype == "float32":
        return result
    coded = {path: round_scales(one, dtype) for path, one in result.coded.items()}
    return result._replace(params=_replace(result.params, coded), coded=coded)


def round_to_nearest_model(params: Any, rules: Rules) -> PostTrained:
    """`put_on_grids` with the scales that the quantizers start from.

    Raises:
      InputError: as there.
      ValueError: as there.
    """
    return put_on_grids(params, init_scales(params, rules), rules)


def gptq_model(
    model: Model,
    params: Any,
    batches: Sequence[dict[str, jax.Array]],
    rules: Rules,
    importance: Callable[[jax.Array], jax.Array] | None = None,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    true_sequential: bool = False,
    keep_unrounded: bool = False,
    between: Callable[[], None] = lambda: None,
) -> PostTrained:
    """GPTQ (arXiv 2210.17323) layer by layer, as in its official code.

    The Hessians of all matrices of a layer are those of its inputs under the layers before it as
    they are after quantization, and summed over the batches in float32; then its matrices are
    quantized, and the batches go on through them. With `true_sequential` (of the official code)
    that holds inside of a layer, too: matrices of one input are quantized before the Hessians of
    the next input are formed. The head is quantized with the hidden states at the end. The
    embedding, of which a token reads one row without any sum, is rounded to nearest.

    Where the damped Hessian has no Cholesky factor, the damping is added once more, up to 50 times
    (RSQ's official code); after that the work ends.

    In memory are the hidden states of all batches, one layer and its Hessians, and the codes; with
    `keep_unrounded` also a copy of all weights.

    Args:
      model: of `params`.
      params: the trained parameters.
      batches: calibration data, all of one shape; padding (segment 0) does not count.
      rules: which leaf is quantized, and how.
      importance: None, or a function from the attention that each token receives, [B, T], to the
        weight of the token in the Hessians, such as `rsq_importance` (RSQ, arXiv 2503.01820, in the
        form of its code). The attention is that of the layer before its own quantization.
      damping, act_order, static_groups: see `objectives.quantization.gptq`.
      true_sequential: see above; four passes over a layer take the place of one.
      keep_unrounded: whether the result has them.
      between: called before every matrix; an exception that it raises ends the work.

    Raises:
      InputError: a Hessian is too ill-conditioned, or weights are not finite.
      ValueError: as `round_to_nearest_model`, or a quantizer that `gptq` does not take.
    """
    outer = {name: part for name, part in params.items() if name not in (LAYERS, HEAD)}
    nearest = round_to_nearest_model(outer, rules)
    coded, losses, unrounded = dict(nearest.coded), {}, {}
    names = layer_matrices(params[LAYERS])
    layer_names = [name for name in names if rules(f"{LAYERS}/{name}") is not None]
    head = HEAD in params and rules(HEAD_MATRIX) is not None
    if not (layer_names or head):
        return PostTrained(_replace(params, coded), coded, losses)

    groups = _groups(layer_names, true_sequential)
    layer_hessians, forward, head_hessian = _passes(model, importance)
    again = itertools.repeat

    orders = (act_order, static_groups)
    quantize = _make_quantize(rules, len(batches), damping, orders, keep_unrounded, between)
    states = list(in_turn(embed(model, nearest.params, batch) for batch in batches))
    found: dict[str, list[GPTQ]] = {name: [] for name in layer_names}
    for index in range(model.config.layers):
        layer = layer_at(params[LAYERS], index)
        for group in groups:
            of_group = functools.partial(layer_hessians, group)
            hessians = _total(map(of_group, again(layer), states, batches, again(index)))
            for name in group:
                weights = leaf_at(layer, name)
                result = quantize(f"{LAYERS}/{name}", weights, hessians[name], index)
                layer = with_leaves(layer, {name: result.weights.astype(weights.dtype)})
                found[name].append(jax.device_get(result._replace(weights=())))
        states = list(in_turn(map(forward, again(layer), states, batches, again(index))))
    for name, layers in found.items():
        path = f"{LAYERS}/{name}"
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
        dtype = leaf_at(params[LAYERS], name).dtype
        coded[path] = Coded(rules(path), stacked.codes, stacked.grid, dtype)
        losses[path] = stacked.loss
        if keep_unrounded:
            unrounded[path] = stacked.unrounded
    if head:
        path, weights = HEAD_MATRIX, leaf_at(params, HEAD_MATRIX)
        outer = {**nearest.params, LAYERS: params[LAYERS]}
        hessian = _total(map(head_hessian, again(outer), states, batches))
        result = quantize(path, weights, hessian)
        coded[path] = Coded(rules(path), result.codes, result.grid, weights.dtype)
        losses[path] = result.loss
        if keep_unrounded:
            unrounded[path] = result.unrounded
    return PostTrained(_replace(params, coded), coded, losses, unrounded=unrounded)


def _groups(names: Sequence[str], true_sequential: bool) -> list[tuple[str, ...]]:
    """The matrices of a layer, in groups that are quantized after one pass over the inputs."""
    if not true_sequential:
        return [tuple(names)] if names else []
    kept = (tuple(name for name in group if name in names) for group in MATRICES_BY_INPUT)
    return [group for group in kept if group]


def _make_quantize(rules, batches, damping, orders, keep_unrounded, between):
    """(path, weights, hessian, layer) -> GPTQ, with as many times the damping as it takes."""

    def quantize(path, weights, hessian, layer=0):
        between()
        quantizer = quantizer_of_layer(rules(path), layer)
        for times in range(1, _MOST_DAMPINGS + 1):
            result = _gptq(weights, hessian, quantizer, times * damping, *orders)
            if jnp.isfinite(result.loss):
                return result if keep_unrounded else result._replace(unrounded=())
        raise InputError(
            f"GPTQ of {path}: the Hessian of {batches} calibration batches has no Cholesky "
            f"factor, damped by up to {_MOST_DAMPINGS * damping:g}; take more batches"
        )

    return quantize


def _passes(model, importance):
    """Compiled: the Hessians of a layer's matrices, the layer itself, and the head's Hessian."""

    @functools.partial(jax.jit, static_argnums=0)
    def layer_hessians(names, layer, x_BTD, batch, index):
        found, valid_BT, r_BT = {}, batch["segment_ids"] > 0, None
        if importance is not None:
            s_BT = attention_received(model, layer, x_BTD, *_places(batch), index)
            least_B1 = jnp.where(valid_BT, s_BT, jnp.inf).min(-1, keepdims=True)
            r_BT = jnp.where(valid_BT, importance(jnp.where(valid_BT, s_BT, least_B1)), 0)

        def product(path, inputs, weights, scale):
            del scale
            name = path.removeprefix(f"{LAYERS}/")
            if name in names:
                inputs_BTI = jnp.where(valid_BT[..., None], inputs, 0)
                found[name] = calibration_hessian(inputs_BTI, r_BT)
            return multiply(inputs, weights)

        model.block(layer, x_BTD, *_places(batch), product, index)
        return found

    @jax.jit
    def forward(layer, x_BTD, batch, index):
        return model.block(layer, x_BTD, *_places(batch), layer=index)

    @jax.jit
    def head_hessian(params, x_BTD, batch):
        hidden_BTD = model.finish(params, x_BTD)
        return calibration_hessian(jnp.where(batch["segment_ids"][..., None] > 0, hidden_BTD, 0))

    return layer_hessians, forward, head_hessian


def attention_received(
    model: Model,
    layer: Any,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    index: jax.Array | int = 0,
) -> jax.Array:
    """s_j = sum over heads and queries i of the attention A_ij of a layer on its input: [B, T].

    RSQ's score of a token (arXiv 2503.01820), whatever the implementation of attention: if the
    values of token j are the number c_j in every channel, s_j is the derivative in c_j of the
    attention's outputs, summed over heads and queries, in one channel.
    """

    def output(c_BT):
        outputs = []

        def product(path, inputs, weights, scale):
            del scale
            if path == VALUE:
                shape = (*inputs.shape[:-1], weights.shape[-1])
                return jnp.broadcast_to(c_BT[..., None], shape).astype(inputs.dtype)
            if path == ATTENTION_OUTPUT:
                outputs.append(inputs.astype(jnp.float32).sum() / model.config.head_width)
            return multiply(inputs, weights)

        model.block(layer, x_BTD, positions_BT, segment_ids_BT, product, index)
        return outputs[0]

    return jax.grad(output)(jnp.ones(x_BTD.shape[:2], jnp.float32))


@functools.partial(jax.jit, static_argnums=(2, 4, 5))
def _gptq(weights, hessian, quantizer, damping, act_order, static_groups):
    return gptq(
        weights,
        hessian,
        quantizer,
        damping=damping,
        act_order=act_order,
        static_groups=static_groups,
    )


def _places(batch):
    return batch["positions"], batch["segment_ids"]


def _total(trees):
    """The sum of an iterator of trees, of which two are in memory at a time."""
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), in_turn(trees))


def _replace(tree, coded: dict[str, Coded]):
    """`tree` with the leaves of `coded` decoded; the others are the same arrays."""
    for name, leaf in coded.items():
        tree = with_leaves(tree, {name: leaf.decode()})
    return tree
