"""Quantization of a trained model without training it: round to nearest, GPTQ, and GPTQ with RSQ.

B rows, T tokens, D width, I inputs and O outputs of a matrix, L layers.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import InputError
from lm.model.transformer import Model
from lm.training.packed import Coded, code_leaves
from objectives.quantization import calibration_hessian, gptq, init_scales
from objectives.quantization.qat import Rules, rule_of


class PostTrained(NamedTuple):
    """A model after `round_to_nearest_model` or `gptq_model`.

    Attributes:
      params: the parameters, quantized leaves on their grids.
      coded: path -> codes and grid of each quantized leaf.
      losses: path -> what GPTQ reports for each matrix that it quantized, see
        `objectives.quantization.post_training.GPTQ`; float32 [L] for stacked leaves.
    """

    params: Any
    coded: dict[str, Coded]
    losses: dict[str, np.ndarray]

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """(path, `Coded` or array) of every leaf, for `packed.write_packed`."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            yield name, self.coded.get(name, leaf)


def round_to_nearest_model(params: Any, rules: Rules) -> PostTrained:
    """Every quantizer applied once, with the scale that it starts from.

    Raises:
      InputError: weights that are not finite.
      ValueError: a leaf that no rule covers, or whose shape does not fit its quantizer.
    """
    scales = init_scales(params, rules)
    coded = {n: c for n, c in code_leaves(params, scales, rules) if isinstance(c, Coded)}
    return PostTrained(_replace(params, coded), coded, {})


def gptq_model(
    model: Model,
    params: Any,
    batches: Sequence[dict[str, jax.Array]],
    rules: Rules,
    importance: Callable[[jax.Array], jax.Array] | None = None,
    *,
    damping: float = 0.01,
) -> PostTrained:
    """GPTQ (arXiv 2210.17323) layer by layer, as in its official code.

    The Hessians of all matrices of a layer are those of its inputs under the layers before it as
    they are after quantization, and summed over the batches in float32; then its matrices are
    quantized, and the batches go on through them. (The official option to do that after every
    matrix, `true_sequential`, is left out.) The head is quantized with the hidden states at the
    end. The embedding, of which a token reads one row without any sum, is rounded to nearest.

    In memory are the hidden states of all batches, one layer and its Hessians, and the codes.

    Args:
      model: of `params`.
      params: the trained parameters.
      batches: calibration data, all of one shape; padding (segment 0) does not count.
      rules: which leaf is quantized, and how.
      importance: None, or a function from the attention that each token receives, [B, T], to the
        weight of the token in the Hessians, such as `rsq_importance` (RSQ, arXiv 2503.01820, in the
        form of its code). The attention is that of the layer before its own quantization.
      damping: see `objectives.quantization.gptq`.

    Raises:
      InputError: a Hessian is too ill-conditioned, or weights are not finite.
      ValueError: as `round_to_nearest_model`, or a quantizer that `gptq` does not take.
    """
    outer = {name: part for name, part in params.items() if name not in ("layers", "head")}
    nearest = round_to_nearest_model(outer, rules)
    coded, losses = dict(nearest.coded), {}

    def quantize(name, weights, hessian):
        quantizer = rule_of(name, rules)
        result = _gptq(weights, hessian, quantizer, damping=damping)
        if not jnp.isfinite(result.loss):
            raise InputError(
                f"GPTQ of {name}: the Hessian of {len(batches)} calibration batches has no "
                "Cholesky factor; use more batches"
            )
        return Coded(quantizer, result.codes, result.grid, weights.dtype), result.loss

    @jax.jit
    def hessians(layer, x_BTD, batch):
        found, valid_BT = {}, batch["segment_ids"] > 0
        r_BT = None
        if importance is not None:
            s_BT = attention_received(model, layer, x_BTD, *_where(batch))
            least = jnp.where(valid_BT, s_BT, jnp.inf).min(-1, keepdims=True)
            r_BT = jnp.where(valid_BT, importance(jnp.where(valid_BT, s_BT, least)), 0)

        def hook(name, inputs):
            found[name] = calibration_hessian(jnp.where(valid_BT[..., None], inputs, 0), r_BT)
            return inputs

        model.block(layer, x_BTD, *_where(batch), hook)
        return found

    @jax.jit
    def forward(layer, x_BTD, batch):
        return model.block(layer, x_BTD, *_where(batch))

    @jax.jit
    def head_hessian(params, x_BTD, batch):
        hidden_BTD = model.finish(params, x_BTD)
        return calibration_hessian(jnp.where(batch["segment_ids"][..., None] > 0, hidden_BTD, 0))

    names = {f"layers/{name}": name for name in _paths(params["layers"])}
    chosen = [name for path, name in names.items() if rule_of(path, rules) is not None]
    quantized_head = "head" in params and rule_of("head/kernel", rules) is not None
    if not chosen and not quantized_head:
        return PostTrained({**params, **nearest.params}, coded, {})

    embed = jax.jit(lambda params, tokens_BT: model.embed(params, tokens_BT))
    states = [embed(nearest.params, batch["tokens"]) for batch in batches]
    pieces: dict[str, list[tuple[Coded, jax.Array]]] = {name: [] for name in chosen}
    for index in range(model.config.layers if states else 0):
        layer = _layer(params["layers"], index)
        if chosen:
            sums = _total(hessians(layer, x, b) for x, b in zip(states, batches, strict=True))
            of_layer = {
                name: quantize(f"layers/{name}", _get(layer, name), sums[name]) for name in chosen
            }
            for name, piece in of_layer.items():
                pieces[name].append(jax.device_get(piece))
            layer = _replace(layer, {name: c for name, (c, _) in of_layer.items()})
        states = [forward(layer, x, b) for x, b in zip(states, batches, strict=True)]

    for name, layers in pieces.items():
        first = layers[0][0]
        codes, grid = jax.tree.map(lambda *a: np.stack(a), *((c.codes, c.grid) for c, _ in layers))
        coded[f"layers/{name}"] = first._replace(codes=codes, grid=grid)
        losses[f"layers/{name}"] = np.stack([loss for _, loss in layers])
    if quantized_head:
        sums = _total(
            head_hessian(nearest.params, x, b) for x, b in zip(states, batches, strict=True)
        )
        coded["head/kernel"], losses["head/kernel"] = quantize(
            "head/kernel", params["head"]["kernel"], sums
        )
    return PostTrained(_replace(params, coded), coded, losses)


def attention_received(
    model: Model,
    layer: Any,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    """s_j = sum over heads and queries i of the attention A_ij of a layer on its input: [B, T].

    RSQ's score of a token (arXiv 2503.01820), whatever the implementation of attention: if all
    channels of the value of token j are the number c_j, then s_j is the derivative in c_j of the
    sum of a channel of the attention's outputs over heads and queries.
    """
    c, width = model.config, x_BTD.shape[-1]
    value = jnp.full_like(layer["attention"]["value"], 1 / width)
    layer = {**layer, "attention": {**layer["attention"], "value": value}}

    def total(value_BT):
        seen = []

        def hook(name, inputs):
            if name == "attention/value":
                return jnp.broadcast_to(value_BT[..., None], inputs.shape).astype(inputs.dtype)
            if name == "attention/output":
                seen.append(inputs.astype(jnp.float32).sum() / c.head_width)
            return inputs

        model.block(layer, x_BTD, positions_BT, segment_ids_BT, hook)
        (output,) = seen
        return output

    return jax.grad(total)(jnp.ones(x_BTD.shape[:2], jnp.float32))


_gptq = jax.jit(gptq, static_argnames="quantizer")


@jax.jit
def _layer(layers, index):
    """One layer's part of stacked leaves; the index is data, so that one program serves all."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), layers)


def _where(batch):
    return batch["positions"], batch["segment_ids"]


def _total(trees):
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), trees)


def _paths(tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _get(tree, name: str):
    return functools.reduce(lambda node, key: node[key], name.split("/"), tree)


def _replace(tree, coded: dict[str, Coded]):
    """`tree` with the leaves of `coded` decoded; the others are the same arrays."""

    def at_leaf(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return coded[name].decode() if name in coded else leaf

    return jax.tree_util.tree_map_with_path(at_leaf, tree)
