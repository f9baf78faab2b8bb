"""How much every layer of every matrix suffers from every width.

B rows, T tokens, D width, L layers, I and O inputs and outputs of a matrix; n items, each one layer
of one matrix, and p widths.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.compression.widths import OfWidth
from lm.model.interface import Model, Tokens
from lm.model.parameters import LAYERS, path_of
from lm.parallel.in_turn import in_turn
from objectives.cross_entropy import token_statistics
from objectives.quantization import Quantizer, round_to_nearest
from objectives.quantization.qig import quantization_gradients, token_importance
from objectives.terms import masked_sum

Batch = Mapping[str, jax.Array]


class Subject(NamedTuple):
    """What sensitivities are found of.

    Attributes:
      model: of the parameters.
      params: the parameters.
      batches: of one shape; padding has weight 0 and segment 0.
      quantizer_of: (path, bits) -> quantizer.
      choices: the widths, p of them.
      paths: the matrices, stacked over layers.
      point: parameters at which `snip` takes its gradients, where these are not `params`.
    """

    model: Model
    params: Any
    batches: Sequence[Batch]
    quantizer_of: OfWidth
    choices: tuple[float, ...]
    paths: tuple[str, ...]
    point: Any = None

    def items(self) -> list[tuple[str, int]]:
        """(path, layer) of every item, in the order of all arrays [n, p]."""
        found = leaves(self.params)
        return [(path, i) for path in self.paths for i in range(found[path].shape[0])]

    def quantizers(self, path: str) -> list[Quantizer]:
        """The quantizer of each width."""
        return [self.quantizer_of(path, bits) for bits in self.choices]


# A subject -> costs [n, p], of which a plan has as little as its budget allows.
Sensitivity = Callable[[Subject], np.ndarray]


def measured() -> Sensitivity:
    """The increase of the mean loss when one layer of one matrix alone is rounded.

    Exact for one layer at a time; n * p + 1 evaluations of all batches, so for small models, and to
    judge the others by.
    """

    def costs(subject):
        sums = loss_sums(subject.model)

        def loss(params):
            parts = [jax.device_get(x) for x in in_turn(sums(params, b) for b in subject.batches)]
            nll, weight = np.sum(np.array(parts, np.float64), axis=0)
            return nll / weight

        plain, stacks, found = loss(subject.params), leaves(subject.params), []
        for path, layer in subject.items():
            changed = (_with_layer(q, stacks[path], layer) for q in subject.quantizers(path))
            found.append([loss(put(subject.params, {path: leaf})) - plain for leaf in changed])
        return np.array(found)

    return costs


def qig(points: int = 32) -> Sensitivity:
    """The sum over tokens of |QIG| of a layer of which one matrix is rounded (arXiv 2603.17809).

    The form "weights" of `objectives.quantization.qig`: how much the inputs of the layer, token by
    token, have to do with the change of its outputs. The paper weighs tokens with it; as the cost
    of a width it is ours. n * p * points gradients of one layer, of all batches.

    Args:
      points: of the integral; 32 in the official code.
    """

    def costs(subject):
        attribute, forward = _layer_functions(subject.model, points)
        found = np.zeros((len(subject.items()), len(subject.choices)))
        layers = subject.model.config.layers
        names = [path.removeprefix(f"{LAYERS}/") for path in subject.paths]
        for batch in subject.batches:
            x_BTD = _embed(subject.model, subject.params, batch)
            for index in range(layers):
                layer = _layer(subject.params[LAYERS], index)
                weights = leaves(layer)
                for i, (path, name) in enumerate(zip(subject.paths, names, strict=True)):
                    for p, quantizer in enumerate(subject.quantizers(path)):
                        rounded = put(layer, {name: _round(quantizer, weights[name])})
                        total = attribute(layer, rounded, x_BTD, batch, index)
                        found[i * layers + index, p] += float(total)
                x_BTD = jax.block_until_ready(forward(layer, x_BTD, batch, index))
        return found

    return costs


def token_weights(
    model: Model,
    layer: Any,
    rounded: Any,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    index: jax.Array | int = 0,
    *,
    x_q_BTD: jax.Array | None = None,
    form: str = "weights",
    points: int = 32,
) -> jax.Array:
    """Importance of the tokens of a layer's input by QIG, [B, T], 1 in sum over each row.

    For the errors of a scale search, sum_t lambda_t mean_h |y - y_q|. Padding (segment 0) gets 0.

    Args:
      model: of the layer.
      layer: parameters of one layer.
      rounded: the same with quantized weights.
      x_BTD: its input.
      positions_BT: as of `Model.block`.
      segment_ids_BT: as there.
      index: number of the layer.
      x_q_BTD: its input in the quantized stream, for forms other than "weights".
      form: of `quantization_gradients`.
      points: of the integral.

    Raises:
      ValueError: as there.
    """
    ways = _ways(model, layer, rounded, positions_BT, segment_ids_BT, index)
    found_BTD = quantization_gradients(*ways, x_BTD, x_q_BTD, form=form, points=points)
    return token_importance(found_BTD, segment_ids_BT > 0, clip=form != "activations")


def _ways(model, layer, rounded, positions_BT, segment_ids_BT, index):
    """The layer as it is, and rounded, as functions of its input."""

    def way(params):
        def run(x_BTD):
            x_BTD = x_BTD.astype(model.config.dtype)
            return model.block(params, x_BTD, positions_BT, segment_ids_BT, layer=index)

        return run

    return way(layer), way(rounded)


@functools.cache
def _layer_functions(model: Model, points: int):
    """Compiled: sum |QIG| of a layer with a rounded matrix, and the layer itself."""

    @jax.jit
    def attribute(layer, rounded, x_BTD, batch, index):
        where = batch["positions"], batch["segment_ids"]
        ways = _ways(model, layer, rounded, *where, index)
        found_BTD = quantization_gradients(*ways, x_BTD, points=points)
        return jnp.where(batch["segment_ids"][..., None] > 0, jnp.abs(found_BTD), 0).sum()

    @jax.jit
    def forward(layer, x_BTD, batch, index):
        return model.block(layer, x_BTD, batch["positions"], batch["segment_ids"], layer=index)

    return attribute, forward


@functools.cache
def loss_sums(model: Model):
    """Compiled: (params, batch) -> (sum of w * nll, sum of w)."""

    @jax.jit
    def sums(params, batch):
        inputs = Tokens(batch["tokens"], batch["positions"], batch["segment_ids"])
        hidden, head = model.apply(params, inputs).hidden, model.head(params)
        softcap = model.config.logit_softcap
        nll = token_statistics(hidden, head, batch["targets"], softcap=softcap).nll
        return masked_sum(batch["weights"], nll), batch["weights"].sum()

    return sums


@functools.cache
def gradients(model: Model):
    """Compiled: (matrices by path, params, batch) -> sums of loss and weights, and the gradient."""
    sums = loss_sums(model)

    @jax.jit
    def find(matrices, params, batch):
        def loss(matrices):
            return sums(put(params, matrices), batch)

        (nll, weight), gradient = jax.value_and_grad(loss, has_aux=True)(matrices)
        return nll, weight, jax.tree.map(lambda g: g.astype(jnp.float32), gradient)

    return find


@functools.partial(jax.jit, static_argnums=0)
def _with_layer(quantizer, leaf, layer):
    """A stack of which one layer is rounded."""
    return leaf.at[layer].set(round_to_nearest(leaf[layer], quantizer))


@functools.partial(jax.jit, static_argnums=0)
def _round(quantizer, weights):
    return round_to_nearest(weights, quantizer)


@functools.partial(jax.jit, static_argnums=0)
def _embed(model, params, batch):
    return model.embed(params, batch["tokens"], batch["positions"])


@jax.jit
def _layer(layers, index):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers)


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def put(tree: Any, changed: Mapping[str, Any]) -> Any:
    """The tree with some of its leaves replaced, by path."""
    return jax.tree_util.tree_map_with_path(lambda k, x: changed.get(path_of(k), x), tree)
