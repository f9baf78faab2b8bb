"""Statistics of the student together with the logits of a few entries that every token names.

B batch, T length, D width, V vocabulary, K one block of the vocabulary, S entries of a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from objectives.cross_entropy import (
    Partial,
    TokenStatistics,
    block_statistics,
    finish,
    merge,
    merge_over,
)
from objectives.losses.base import Inputs, softmax
from objectives.vocabulary import (
    Scores,
    add_gradients,
    first_column,
    for_each_block,
    not_finite,
    total,
)


class Selected(NamedTuple):
    """Of every token, float32.

    Attributes:
      logits: [B, T, S] of the entries that it names; NaN for one outside of the vocabulary.
      rest: [B, T], log-sum-exp of the logits of all other entries; -inf where there are none.
    """

    logits: jax.Array
    rest: jax.Array


class _Static(NamedTuple):
    scores: Scores
    block_size: int
    axis: str | None


class _Selection(NamedTuple):
    """What a part of the vocabulary has of the selected entries."""

    logits: jax.Array  # 0 where the entry is not in this part
    found: jax.Array  # whether it is
    maximum: jax.Array  # of the logits of the others
    sum_exp: jax.Array  # of the others, relative to the maximum


def selected_statistics(inputs: Inputs, ids_BTS: jax.Array) -> tuple[TokenStatistics, Selected]:
    """Statistics of the student's distribution, and the logits of the entries `ids`.

    With logits z, the log-probability of an entry is z_v - logsumexp, and that of all others
    together is rest - logsumexp: summed by itself, as 1 less the others loses all digits where
    little is left. One block of logits exists at a time, forward and backward, and from each block
    the selected entries are read by their column: [B, T, S] arrays, and no [B, T, V] or
    [B, T, S, D]. Derivatives in the logits are exact:

      d logits_s / d z_v = [v = id_s]          d rest / d z_v = [v not in ids] exp(z_v - rest)

    The statistics and their gradients are those of `objectives.cross_entropy.token_statistics`, and
    so are the rules for weights of 0, for a block size of 0 and for a vocabulary that is spread
    over an axis.

    Args:
      inputs: of a loss.
      ids_BTS: integers [B, T, S] in [0, V), of the whole vocabulary.
    """
    hidden, head, scores = softmax(inputs)
    first = first_column(head, inputs.axis)
    static = _Static(scores, inputs.block_size, inputs.axis)
    compute = _selected if inputs.block_size else _plain
    *found, logits_BTS, rest_BT = compute(
        static, hidden, head, inputs.targets - first, ids_BTS - first
    )
    return TokenStatistics(*found, -found[0]), Selected(logits_BTS, rest_BT)


def _places(ids_BTS, width: int):
    """Columns of a block and whether they are in it; `width` is a column that is in no block."""
    inside_BTS = (ids_BTS >= 0) & (ids_BTS < width)
    return jnp.where(inside_BTS, ids_BTS, width), inside_BTS


def _cells(places_BTS):
    """Indices of [B, T, K] entries."""
    rows, length, _ = places_BTS.shape
    return jnp.arange(rows)[:, None, None], jnp.arange(length)[None, :, None], places_BTS


def _others(logits_BTK, places_BTS):
    """The logits with -inf at the selected entries."""
    return logits_BTK.at[_cells(places_BTS)].set(-jnp.inf, mode="drop")


def _block_selection(logits_BTK, ids_BTS) -> _Selection:
    """Of one block; ids count from its first column."""
    places_BTS, inside_BTS = _places(ids_BTS, logits_BTK.shape[-1])
    clipped_BTS = jnp.minimum(places_BTS, logits_BTK.shape[-1] - 1)
    picked_BTS = jnp.take_along_axis(logits_BTK, clipped_BTS, axis=-1)
    others_BTK = _others(logits_BTK, places_BTS)
    maximum_BT = lax.stop_gradient(others_BTK.max(-1))
    return _Selection(
        jnp.where(inside_BTS, picked_BTS, 0.0),
        inside_BTS.astype(jnp.float32),
        maximum_BT,
        jnp.exp(others_BTK - _finite(maximum_BT)[..., None]).sum(-1),
    )


def _finite(maximum_BT):
    """A maximum to subtract: -inf - -inf is NaN."""
    return jnp.where(maximum_BT == -jnp.inf, 0.0, maximum_BT)


def _merge_selections(a: _Selection, b: _Selection) -> _Selection:
    maximum_BT = jnp.maximum(a.maximum, b.maximum)
    scale_a, scale_b = (jnp.exp(x.maximum - _finite(maximum_BT)) for x in (a, b))
    return _Selection(
        a.logits + b.logits,
        a.found + b.found,
        maximum_BT,
        scale_a * a.sum_exp + scale_b * b.sum_exp,
    )


def _finish(static, partial: Partial, selection: _Selection):
    """(nll, logsumexp, entropy, selected logits, log-sum-exp of the rest)."""
    if static.axis:
        partial = merge_over(static.axis, partial)
        maximum_BT = lax.pmax(lax.stop_gradient(selection.maximum), static.axis)
        scale_BT = jnp.exp(selection.maximum - _finite(maximum_BT))
        parts = selection.logits, selection.found, scale_BT * selection.sum_exp
        logits_BTS, found_BTS, sum_BT = total(parts, static.axis)
        selection = _Selection(logits_BTS, found_BTS, maximum_BT, sum_BT)
    some_BT = selection.sum_exp > 0
    log_sum_BT = jnp.log(jnp.where(some_BT, selection.sum_exp, 1.0)) + selection.maximum
    # A sum that is NaN is not "none".
    none_BT = selection.sum_exp == 0
    rest_BT = jnp.where(none_BT, -jnp.inf, jnp.where(some_BT, log_sum_BT, jnp.nan))
    logits_BTS = jnp.where(selection.found > 0, selection.logits, jnp.nan)
    return *finish(partial), logits_BTS, rest_BT


def _plain(static, hidden_BTD, head_DV, targets_BT, ids_BTS):
    """All logits at once; the derivatives are JAX's own."""
    bad_BT = not_finite(static.scores, hidden_BTD, head_DV, static.axis)
    # Both: the product has the gradient d logits @ head, and 0 * inf is NaN.
    logits_BTV = static.scores.logits(jnp.where(bad_BT[..., None], 0, hidden_BTD), head_DV)
    logits_BTV = jnp.where(bad_BT[..., None], 0, logits_BTV)
    partial, selection = (
        block_statistics(logits_BTV, targets_BT),
        _block_selection(logits_BTV, ids_BTS),
    )
    found = _finish(static, partial, selection)
    return tuple(
        jnp.where(bad_BT.reshape(bad_BT.shape + (1,) * (x.ndim - 2)), jnp.nan, x) for x in found
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected(static, hidden_BTD, head_DV, targets_BT, ids_BTS):
    def add_block(sums, head_DK, start):
        logits_BTK = static.scores.logits(hidden_BTD, head_DK)
        block = (
            block_statistics(logits_BTK, targets_BT - start),
            _block_selection(logits_BTK, ids_BTS - start),
        )
        if sums is None:
            return block
        return merge(sums[0], block[0]), _merge_selections(sums[1], block[1])

    return _finish(static, *for_each_block(head_DV, static.block_size, add_block, None))


def _forward(static, *arguments):
    arrays = [argument.value for argument in arguments]
    outputs = _selected(static, *arrays)
    _, logsumexp_BT, entropy_BT, _, rest_BT = outputs
    return outputs, (*arrays, logsumexp_BT, entropy_BT, rest_BT)


def _backward(static, residuals, cotangents):
    hidden_BTD, head_DV, targets_BT, ids_BTS, logsumexp_BT, entropy_BT, rest_BT = residuals
    through_entropy = not isinstance(cotangents[2], SymbolicZero)
    d_nll_BT, d_logsumexp_BT, d_entropy_BT, d_logits_BTS, d_rest_BT = (
        jnp.zeros(shape.shape, jnp.float32) if isinstance(cotangent, SymbolicZero) else cotangent
        for cotangent, shape in zip(
            cotangents, (rest_BT, rest_BT, rest_BT, ids_BTS, rest_BT), strict=True
        )
    )
    live_BT = (d_nll_BT != 0) | (d_logsumexp_BT != 0) | (d_entropy_BT != 0) | (d_rest_BT != 0)
    live_BT |= (d_logits_BTS != 0).any(-1)
    hidden_BTD = jnp.where(live_BT[..., None], hidden_BTD, 0)
    d_probability_BT = d_nll_BT + d_logsumexp_BT
    if through_entropy:
        d_probability_BT -= d_entropy_BT * entropy_BT

    def add_block(gradients, head_DK, start):
        logits_BTK = static.scores.logits(hidden_BTD, head_DK)
        log_p_BTK = logits_BTK - logsumexp_BT[..., None]
        slope_BTK = d_probability_BT[..., None]
        if through_entropy:
            slope_BTK = slope_BTK - d_entropy_BT[..., None] * log_p_BTK
        is_target_BTK = (targets_BT - start)[..., None] == jnp.arange(head_DK.shape[1])
        dz_BTK = jnp.exp(log_p_BTK) * slope_BTK - jnp.where(is_target_BTK, d_nll_BT[..., None], 0)
        places_BTS, _ = _places(ids_BTS - start, head_DK.shape[1])
        others_BTK = _others(logits_BTK, places_BTS)
        dz_BTK += d_rest_BT[..., None] * jnp.exp(others_BTK - _finite(rest_BT)[..., None])
        dz_BTK = dz_BTK.at[_cells(places_BTS)].add(d_logits_BTS, mode="drop")
        block = static.scores.pull_back(hidden_BTD, head_DK, logits_BTK, dz_BTK, live_BT)
        return add_gradients(gradients, block, start)

    dhidden_BTD, dhead_DV = for_each_block(
        head_DV, static.block_size, add_block, (None, jnp.zeros_like(head_DV))
    )
    # A second time, for a head that is not finite: 0 * inf is NaN.
    dhidden_BTD = jnp.where(live_BT[..., None], dhidden_BTD, 0)
    return dhidden_BTD.astype(residuals[0].dtype), dhead_DV, None, None


_selected.defvjp(_forward, _backward, symbolic_zeros=True)
