"""Outlier Suppression+ (arXiv 2304.09145) of a whole model whose activations will be quantized.

B rows, T tokens, I inputs and O outputs of a matrix, L layers.
"""

import dataclasses
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
from lm.model.parameters import LAYERS, path_of
from lm.model.streams import (
    SCORE_MATRICES,
    Group,
    bias_of,
    check_changeable,
    leaf_at,
    normed_groups,
    scale_inputs,
    shift_norm,
    with_biases,
    with_leaves,
)
from lm.model.transformer import make_model
from lm.parallel.in_turn import in_turn
from lm.parallel.mesh import to_host
from objectives.quantization.gptq import round_to_nearest
from objectives.quantization.outlier_suppression import channel_range, middle, search_threshold
from objectives.quantization.qat import Rules

Activation = Callable[[jax.Array], jax.Array]


class Migration(NamedTuple):
    """What `search_outlier_suppression` finds for the inputs behind one norm, in all layers.

    Attributes:
      shift: z, [L, I].
      scale: s, [L, I].
      threshold: t, [L].
      loss: at t, [L].
      first_loss: shifted, but not scaled, [L].
    """

    shift: np.ndarray
    scale: np.ndarray
    threshold: np.ndarray
    loss: np.ndarray
    first_loss: np.ndarray


def outlier_suppression_model(
    model: Model,
    params: Any,
    batches: Sequence[Batch],
    rules: Rules,
    activation: Activation | None,
    **options: Any,
) -> tuple[dict[str, Any], Any]:
    """The same function, with inputs of matrices that are easier to quantize.

    See `search_outlier_suppression` for what is searched, and `apply_outlier_suppression` for where
    it is put.

    Args:
      model: this and the rest as there.
      params: the trained parameters.
      batches: calibration data.
      rules: which leaf is to be quantized, and how.
      activation: the quantizer of inputs.
      **options: keyword arguments of `search_outlier_suppression`.

    Returns:
      Keys of the config's `model` section that change -> their values, and the new parameters.

    Raises:
      InputError: as there.
    """
    found = search_outlier_suppression(model, params, batches, rules, activation, **options)
    return apply_outlier_suppression(model, params, found)


def search_outlier_suppression(
    model: Model,
    params: Any,
    batches: Sequence[Batch],
    rules: Rules,
    activation: Activation | None,
    *,
    shift: bool = True,
    tokens: int = 1024,
    most_steps: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Migration]:
    """A shift and a scale of every channel behind the norms in front of attention and MLP.

    The shift is the middle of the channel's range, the scale follows from a threshold t that all
    channels are to keep, see `objectives.quantization.outlier_suppression`. t has the smallest
    squared error, with rounded (x - z) / s and rounded s W, of the attention's output for query,
    key and value together, and of the products themselves for up and gate. As in the official
    code, inputs that are not a norm's stay as they are.

    A layer's inputs are those of the model as it was; whether that is so in the official code is
    unconfirmed.

    Args:
      model: of `params`.
      params: the trained parameters.
      batches: calibration data, all of one shape; padding (segment 0) does not count.
      rules: which leaf is to be quantized, and how. The quantizers start from their first scales.
      activation: the quantizer of the inputs, of `objectives.quantization.activation_quantizer`;
        None leaves them as they are.
      shift: whether channels are shifted. It takes biases, see `apply_outlier_suppression`.
      tokens: rows are taken evenly from the batches, as many as have this number of tokens; the
        official configs take 128 rows of 512 or 2048. The time is in proportion.
      most_steps: a bound on the candidates for t. The official code has none: there are at least
        100, and two for each unit of the largest input.
      between: called before every group; an exception that it raises ends the work.

    Returns:
      The name of the norm, such as "attention_norm" -> its `Migration`.

    Raises:
      InputError: no norm in front of the matrices, adapters, packed matrices, or a layer with
        outputs that are not finite.
    """
    config = model.config
    check_changeable(config, params, "Outlier Suppression+")
    groups = normed_groups(config)
    programs = [_program(model, group, rules, activation, shift, most_steps) for group in groups]
    batch = sample_rows(batches, tokens)
    x_BTD = embed(model, params, batch)
    kept: dict[str, list[Migration]] = {group.norm: [] for group in groups}
    for index in range(config.layers):
        layer = layer_at(params[LAYERS], index)
        walked = inputs_and_output(model, layer, x_BTD, batch, index)
        inputs, x_BTD = next(in_turn([walked]))
        for group, search in zip(groups, programs, strict=True):
            between()
            best = search(layer, inputs[group.matrices[0]], batch, index)
            one = Migration(*map(to_host, best))
            if not np.isfinite(one.first_loss):
                raise InputError(
                    f"Outlier Suppression+: layer {index} has outputs that are not finite"
                )
            kept[group.norm].append(one)
    return {
        norm: jax.tree.map(lambda *layers: np.stack(layers), *layers)
        for norm, layers in kept.items()
    }


def apply_outlier_suppression(
    model: Model, params: Any, found: dict[str, Migration]
) -> tuple[dict[str, Any], Any]:
    """The same function with shifts and scales folded into norms, matrices and biases.

      gain / s,   (bias of the norm - z) / s,   s W,   b + z W

    What has a shift needs biases that a model may lack: those of query, key and value
    (`model.attention_bias`), of the MLP (`model.mlp_bias`), and behind an RMSNorm
    (`model.norm_bias`). They are switched on where a shift is not zero; those that come with them
    are zeros. Computed in float32 and rounded once.

    Returns:
      Keys of the config's `model` section that change -> their values, and the new parameters.
    """
    config = model.config
    shifted = {norm for norm, one in found.items() if np.any(one.shift)}
    changes = with_biases(config, shifted)
    new = dataclasses.replace(config, **changes)
    return changes, _applied(config, new, params, found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _applied(config: ModelConfig, new: ModelConfig, params: Any, found: dict[str, Migration]):
    names = {path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path(params)}
    wanted = jax.eval_shape(make_model(new).init, jax.random.key(0))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        if (path := path_of(keys)) not in names:
            params = with_leaves(params, {path: jnp.zeros(leaf.shape, leaf.dtype)})
    layers = params[LAYERS]
    for group in normed_groups(config):
        one = found[group.norm]
        moved = {}
        for name in group.matrices:
            if (bias_LO := leaf_at(layers, bias_of(name))) is not None:
                w_LIO = leaf_at(layers, name).astype(jnp.float32)
                moved_LO = jnp.einsum("li,lio->lo", one.shift, w_LIO, precision="highest")
                moved[bias_of(name)] = (bias_LO.astype(jnp.float32) + moved_LO).astype(
                    bias_LO.dtype
                )
        layers = shift_norm(with_leaves(layers, moved), group, one.shift)
        layers = scale_inputs(config, layers, group, one.scale)
    return {**params, LAYERS: layers}


def _program(model: Model, group: Group, rules, activation, shift, most_steps):
    """Compiled: shift, scale, threshold and losses of a group in one layer."""
    quantizers = {name: rules(f"{LAYERS}/{name}") for name in group.matrices}
    through_softmax = bool(set(SCORE_MATRICES) & set(group.matrices))

    def outputs(layer, batch, index, inputs_BTI, product):
        if through_softmax:
            return [group_output(model, layer, batch, index, group, inputs_BTI, product)]
        return [product(name, inputs_BTI, leaf_at(layer, name)) for name in group.matrices]

    @jax.jit
    def search(layer, inputs_BTI, batch, index):
        valid_BT = batch["segment_ids"] > 0
        found = channel_range(inputs_BTI, valid_BT)
        z_I = middle(found) if shift else jnp.zeros_like(found.low)

        def plain(name, x_BTI, w_IO):
            del name
            return multiply(x_BTI, w_IO)

        def loss(s_I):
            def rounded(name, x_BTI, w_IO):
                x_BTI = ((x_BTI.astype(jnp.float32) - z_I) / s_I).astype(x_BTI.dtype)
                x_BTI = x_BTI if activation is None else activation(x_BTI)
                scaled_IO = w_IO.astype(jnp.float32) * s_I[:, None]
                if (quantizer := quantizers[name]) is not None:
                    scaled_IO = round_to_nearest(scaled_IO, quantizer)
                bias_O = jnp.matmul(z_I, w_IO.astype(jnp.float32), precision="highest")
                return multiply(x_BTI, scaled_IO) + bias_O.astype(x_BTI.dtype)

            got = outputs(layer, batch, index, inputs_BTI, rounded)
            return _squared_error(target, got, valid_BT)

        target = outputs(layer, batch, index, inputs_BTI, plain)
        best = search_threshold(loss, found, z_I, most_steps)
        return Migration(z_I, best.scale, best.threshold, best.loss, best.first_loss)

    return search


def _squared_error(target, got, valid_BT):
    """|y - y'|^2 summed over outputs, averaged over valid tokens."""
    sums = [
        jnp.square(y.astype(jnp.float32) - z.astype(jnp.float32)).sum(-1)
        for y, z in zip(target, got, strict=True)
    ]
    return jnp.where(valid_BT, sum(sums), 0).sum() / jnp.maximum(valid_BT.sum(), 1)
