"""A trained model with its residual stream and its values rotated, and the same logits.

L layers, D width, O outputs of a matrix, N heads, K key-value heads, H head width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.model.interface import Model
from lm.model.parameters import HEAD, HEAD_MATRIX, LAYERS, VALUE
from lm.model.streams import (
    FINAL_NORM,
    WRITERS,
    bias_of,
    check_changeable,
    gain,
    layer_groups,
    leaf_at,
    residual_embeddings,
    with_gain,
    with_leaves,
)
from lm.model.transformer import make_model
from objectives.quantization.hadamard import hadamard, randomized_hadamard


def rotate_model(
    model: Model, params: Any, seed: int, *, heads: bool = True
) -> tuple[dict[str, Any], Any]:
    """The same function with weights that are closer to normal: fewer outliers, easier to quantize.

    As in QuaRot (arXiv 2404.00456) and RSQ (arXiv 2503.01820), with R [D, D] a randomised Hadamard
    matrix and g the gain of the norm that a matrix reads,

      matrices that read a norm, and the head:   R^T diag(g) W,   and the norm's gain becomes 1
      embeddings, matrices and biases that write to the residual stream:   W R,   b R

    because x -> x R leaves rms(x) as it is. The channels of every value head are rotated by one
    Hadamard matrix of the head's width, those of the output's inputs back; all heads have the same
    one, so that a value head that several query heads share needs no more. What QuaRot does while
    the model runs, in front of `mlp/down` and on keys and queries, is left out: nothing of it could
    be folded into weights. RSQ's code subtracts each embedding row's mean, too; only a
    LayerNorm does not see that, so it is not done here.

    A head that is made of the embedding becomes one of its own, because the last norm's gain is in
    it. Computed in float32 and rounded once to the dtype of the parameters. The logits change by
    rounding alone; `model.norm_epsilon` stays where it was.

    Args:
      model: of `params`.
      params: the trained parameters.
      seed: of the random signs in R.
      heads: whether values are rotated, too.

    Returns:
      Keys of the config's `model` section that change -> their values, and the new parameters.

    Raises:
      InputError: a norm other than "rmsnorm", norms that are not "before", an embedding without a
        matrix, adapters, packed matrices, or a width that has no Hadamard matrix.
    """
    config = model.config
    _check(config, params)
    key = jax.random.key(seed)
    r_DD = _of_width("width", config, lambda width: randomized_hadamard(width, key))
    r_HH = (
        _of_width("head_width", config, lambda width: hadamard(width) / width**0.5)
        if heads
        else None
    )
    changes = {key: False for key in ("tied_head", "code_head") if getattr(config, key)}
    params = jax.tree.map(jnp.asarray, params)
    shardings, structure = jax.tree.flatten(jax.tree.map(lambda a: a.sharding, params))
    config = dataclasses.replace(config, dtype="float32")
    return changes, _compiled(config, structure, tuple(shardings))(params, r_DD, r_HH)


def _check(config: ModelConfig, params: Any) -> None:
    check_changeable(config, params, "a rotation")
    for key, only, why in (
        ("norm", "rmsnorm", "a LayerNorm subtracts a mean that a rotation does not keep"),
        ("norm_bias", False, "what it adds would need a bias of every matrix"),
        ("norm_placement", "before", "a gain behind a sub-block is not one of rotated channels"),
    ):
        if (value := getattr(config, key)) != only:
            raise InputError(f"model.{key}={value} cannot be rotated: {why}; valid: {only}")
    residual_embeddings(config)


def _of_width(key: str, config: ModelConfig, make: Callable[[int], Any]) -> Any:
    width = getattr(config, key)
    try:
        return make(width)
    except ValueError as error:
        raise InputError(f"model.{key}={width} cannot be rotated: {error}") from None


@functools.lru_cache
def _compiled(config, structure, shardings):
    """`_rotated` with results that lie where the parameters lay; XLA places a new head."""
    placed = jax.tree.unflatten(structure, shardings)
    placed = {**placed, HEAD: placed.get(HEAD)}
    return jax.jit(functools.partial(_rotated, config), out_shardings=placed)


def _rotated(config: ModelConfig, params: Any, r_DD: jax.Array, r_HH: jax.Array | None) -> Any:
    """The new parameters."""
    head_DV = make_model(config).head(params)
    new = {name: part for name, part in params.items() if name != HEAD}
    new[LAYERS] = _rotated_layers(config, params[LAYERS], r_DD, r_HH)
    for path in residual_embeddings(config):
        new = with_leaves(new, {path: _onto(leaf_at(params, path), r_DD)})

    norm = params[FINAL_NORM]
    g_D = gain(config, norm)
    new[FINAL_NORM] = with_gain(config, norm, jnp.ones_like(g_D))
    kept = leaf_at(params, HEAD_MATRIX)
    dtype = jnp.dtype(config.param_dtype) if kept is None else kept.dtype
    return with_leaves(new, {HEAD_MATRIX: _reading(head_DV, g_D, r_DD).astype(dtype)})


def _rotated_layers(config, layers, r_DD, r_HH):
    """Stacked layers, rotated."""
    new = layers
    for group in layer_groups(config):
        if group.norm:
            g_LD = gain(config, layers[group.norm])
            new = with_leaves(
                new, {group.norm: with_gain(config, layers[group.norm], jnp.ones_like(g_LD))}
            )
            for name in group.matrices:
                w_LDO = leaf_at(layers, name)
                new = with_leaves(new, {name: _reading(w_LDO, g_LD, r_DD).astype(w_LDO.dtype)})
        elif r_HH is not None and f"{LAYERS}/{group.producer}" == VALUE:
            new = _rotated_heads(new, group, r_HH)
    for name in WRITERS:
        for written in (name, bias_of(name)):
            if (leaf := leaf_at(new, written)) is not None:
                new = with_leaves(new, {written: _onto(leaf, r_DD)})
    return new


def _rotated_heads(layers, group, r_HH):
    """The channels of each value head rotated, and the inputs of the matrix that reads them."""
    width = len(r_HH)
    changed = {}
    for name in (group.producer, bias_of(group.producer)):
        if (leaf := leaf_at(layers, name)) is not None:
            by_head = leaf.reshape(*leaf.shape[:-1], -1, width)
            changed[name] = _onto(by_head, r_HH).reshape(leaf.shape)
    for name in group.matrices:
        w_LMD = leaf_at(layers, name)
        w_LNHD = w_LMD.reshape(len(w_LMD), -1, width, w_LMD.shape[-1]).astype(jnp.float32)
        back = jnp.einsum("hi,lnhd->lnid", r_HH, w_LNHD, precision="highest")
        changed[name] = back.reshape(w_LMD.shape).astype(w_LMD.dtype)
    return with_leaves(layers, changed)


def _onto(array, r_DD):
    """array R, over the last axis, in the array's dtype."""
    rotated = jnp.matmul(array.astype(jnp.float32), r_DD, precision="highest")
    return rotated.astype(array.dtype)


def _reading(w_DO, g_D, r_DD):
    """R^T diag(g) W in float32, [..., D, O]."""
    scaled = w_DO.astype(jnp.float32) * g_D[..., None]
    return jnp.einsum("dc,...do->...co", r_DD, scaled, precision="highest")
