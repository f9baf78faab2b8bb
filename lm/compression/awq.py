"""AWQ (arXiv 2306.00978) of a whole model: scales folded into neighbours, and weights clipped.

B rows, T tokens, D width, I inputs and O outputs of a matrix, L layers, G groups of inputs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.compression.calibration import (
    Batch,
    embed,
    group_output,
    inputs_and_output,
    layer_at,
    multiply,
    sample_rows,
)
from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.model.interface import Model
from lm.model.parameters import LAYERS
from lm.model.streams import (
    SCORE_MATRICES,
    Group,
    check_changeable,
    layer_groups,
    leaf_at,
    scale_inputs,
    with_leaves,
)
from lm.parallel.in_turn import in_turn
from lm.parallel.mesh import to_host
from objectives.quantization.awq import (
    clip_weights,
    magnitude,
    output_error,
    scaled_rounding,
    search_clip,
    search_scale,
)
from objectives.quantization.gptq import round_to_nearest
from objectives.quantization.qat import Rules

# (block, the block with rounded weights, its input [B, T, I], batch) -> weight of each token
# [B, T], not negative. Both blocks are differentiable functions of the input.
Importance = Callable[[Callable, Callable, jax.Array, Batch], jax.Array]


class AWQ(NamedTuple):
    """What `search_awq` finds; numbers of all layers are stacked.

    Attributes:
      scales: name of the first matrix of a group, such as "attention/query" -> [L, I].
      losses: the same names -> [L, 20], the loss of every ratio; the first is that of rounding to
        nearest.
      limits: name of a matrix -> where its weights are clipped, [L, G, 1, O], after `fold_scales`.
    """

    scales: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    limits: dict[str, np.ndarray]


def awq_model(
    model: Model, params: Any, batches: Sequence[Batch], rules: Rules, **options: Any
) -> Any:
    """Parameters with the scales of `search_awq` folded in, and clipped: ready to be rounded.

    But for the clip (`clip=False` leaves it out) the function is that of the given parameters.

    Args:
      model: this and the rest as in `search_awq`.
      params: the trained parameters.
      batches: calibration data.
      rules: which leaf is to be quantized, and how.
      **options: keyword arguments of `search_awq`.

    Raises:
      InputError: as there.
      ValueError: as there.
    """
    found = search_awq(model, params, batches, rules, **options)
    return apply_awq(model, params, found, rules)


def search_awq(
    model: Model,
    params: Any,
    batches: Sequence[Batch],
    rules: Rules,
    *,
    scales: bool = True,
    clip: bool = True,
    tokens: int = 4096,
    clip_tokens: int = 512,
    importance: Importance | None = None,
    error: str = "squared",
    between: Callable[[], None] = lambda: None,
) -> AWQ:
    """The scales and clips of AWQ, layer by layer, as in its official code.

    Every group of matrices that multiply the same input x gets a scale s for each channel of it,
    folded into what makes x: x / s meets s W. With s_X = mean |x| the candidates are the powers
    s_X^(i / 20), normalised, see `objectives.quantization.awq`; the best has the smallest error of
    the real output of attention (query, key and value together) or MLP (up and gate), or of the
    matrix itself (output, down), with W' = Q(s W) / s. Then weights are clipped by group, except
    those of query and key, because the softmax magnifies errors of their outputs.

    A layer's inputs are those of the model as it was: nothing is quantized before it, and all
    groups of a layer are searched with the layer's own weights, then folded together. `output` has
    a scale only where each value head has one query head; `down` only in a gated MLP, where it goes
    into `up` (the official code puts a scaled activation into MLPs without a gate); what reads the
    residual stream without a norm has none. Embedding and head are left alone.

    In memory are the model, the inputs of one layer and one candidate of a group.

    Args:
      model: of `params`.
      params: the trained parameters.
      batches: calibration data, all of one shape; padding (segment 0) does not count.
      rules: which leaf is to be quantized, and how. The quantizers start from their first scales.
      scales: whether scales are searched.
      clip: whether clips are.
      tokens: rows are taken evenly from the batches, as many as have this number of tokens. The
        official command takes 128 * 512; the time is in proportion.
      clip_tokens: of which this many count in the search of clips, 512 in the official code.
      importance: None, or the weight of each token in the loss of scales and clips; it is called
        while programs are traced, once for the scales and once for the clips of every group.
      error: of the search of scales, "squared" or "absolute", see `output_error`; clips are chosen
        by squared errors always.
      between: called before every group; an exception that it raises ends the work.

    Raises:
      InputError: adapters, packed matrices, or a layer with outputs that are not finite.
      ValueError: another `error`, or a quantizer of tables.
    """
    config = model.config
    check_changeable(config, params, "AWQ")
    groups = _groups(config, rules)
    programs = {
        group: _programs(model, group, rules, importance, error, clip_tokens) for group in groups
    }
    batch = sample_rows(batches, tokens)
    x_BTD = embed(model, params, batch)
    kept: list[AWQ] = []
    for index in range(config.layers):
        layer = layer_at(params[LAYERS], index)
        walked = inputs_and_output(model, layer, x_BTD, batch, index)
        inputs, next_BTD = next(in_turn([walked]))
        found = AWQ({}, {}, {})
        for group, (search, _) in programs.items():
            between()
            if scales and _has_place(layer, group):
                name = group.matrices[0]
                best = search(layer, inputs[name], batch, index)
                found.scales[name], found.losses[name] = map(to_host, best)
                if not np.isfinite(found.losses[name][0]):
                    raise InputError(f"AWQ: layer {index} has outputs that are not finite")
        if clip:
            folded = _folded(config, layer, found.scales)
            for group, (_, limit) in programs.items():
                name = group.matrices[0]
                scale = found.scales.get(name, np.ones(inputs[name].shape[-1], np.float32))
                limits = limit(layer, folded, inputs[name], scale, batch, index)
                found.limits.update(jax.tree.map(to_host, limits))
        kept.append(found)
        x_BTD = next_BTD
    return jax.tree.map(lambda *layers: np.stack(layers), *kept)


def fold_scales(config: ModelConfig, layers: Any, scales: dict[str, Any]) -> Any:
    """The same function with every input of a group divided by its scale, and its weights times it.

    Args:
      config: of the model.
      layers: parameters of all layers, stacked, or of one.
      scales: of `AWQ`; [I] for one layer.
    """
    for group in layer_groups(config):
        if (s_I := scales.get(group.matrices[0])) is not None:
            layers = scale_inputs(config, layers, group, s_I)
    return layers


_folded = jax.jit(fold_scales, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply_awq(model: Model, params: Any, found: AWQ, rules: Rules) -> Any:
    """The parameters with scales folded in, then clipped.

    Without limits (`found._replace(limits={})`) the function stays as it is.

    Args:
      model: of `params`.
      params: those that `found` is of.
      found: of `search_awq`.
      rules: those of `found`.
    """
    layers = fold_scales(model.config, params[LAYERS], found.scales)
    clipped = {
        name: clip_weights(leaf_at(layers, name), limit, rules(f"{LAYERS}/{name}"))
        for name, limit in found.limits.items()
    }
    return {**params, LAYERS: with_leaves(layers, clipped)}


def _groups(config: ModelConfig, rules: Rules) -> list[Group]:
    """Those of which a matrix is quantized."""
    return [
        group
        for group in layer_groups(config)
        if any(rules(f"{LAYERS}/{name}") is not None for name in group.matrices)
    ]


def _has_place(layer, group) -> bool:
    """Whether the scale of a group can be folded into what makes its input, channel by channel."""
    if not group.producer:
        return bool(group.norm)
    return leaf_at(layer, group.producer).shape[-1] == leaf_at(layer, group.matrices[0]).shape[-2]


def _programs(model, group, rules, importance, error, clip_tokens):
    """Compiled: the search of a group's scale, and that of the clips of its matrices."""
    quantizers = {name: rules(f"{LAYERS}/{name}") for name in group.matrices}
    quantizers = {name: q for name, q in quantizers.items() if q is not None}

    def output(layer, batch, index, inputs_BTI, weights):
        def product(name, x_BTI, w_IO):
            return multiply(x_BTI, weights.get(name, w_IO))

        return group_output(model, layer, batch, index, group, inputs_BTI, product)

    def token_weights(layer, inputs_BTI, batch, index):
        valid_BT = batch["segment_ids"] > 0
        if importance is None:
            return valid_BT.astype(jnp.float32)
        block = functools.partial(output, layer, batch, index)
        rounded = {n: round_to_nearest(leaf_at(layer, n), q) for n, q in quantizers.items()}
        a_BT = importance(
            functools.partial(block, weights={}),
            functools.partial(block, weights=rounded),
            inputs_BTI,
            batch,
        )
        return jnp.where(valid_BT, a_BT, 0)

    @jax.jit
    def search(layer, inputs_BTI, batch, index):
        target_BTO = output(layer, batch, index, inputs_BTI, {})
        a_BT = token_weights(layer, inputs_BTI, batch, index)

        def loss(s_I):
            weights = {n: scaled_rounding(leaf_at(layer, n), s_I, q) for n, q in quantizers.items()}
            got_BTO = output(layer, batch, index, inputs_BTI, weights)
            return output_error(target_BTO, got_BTO, a_BT, error)

        return search_scale(loss, magnitude(inputs_BTI, batch["segment_ids"] > 0))

    @jax.jit
    def limit(layer, folded, inputs_BTI, s_I, batch, index):
        a_T = token_weights(layer, inputs_BTI, batch, index).reshape(-1)
        x_TI = inputs_BTI.reshape(a_T.size, -1)
        x_TI = jnp.where(a_T[:, None] > 0, x_TI.astype(jnp.float32) / s_I, 0)
        step = max(1, a_T.size // clip_tokens)
        return {
            name: search_clip(leaf_at(folded, name), x_TI[::step], q, a_T[::step])
            for name, q in quantizers.items()
            if name not in SCORE_MATRICES
        }

    return search, limit
