"""Losses that are an expectation of log-probabilities under another distribution, in blocks.

B batch, T length, D width, V vocabulary, K one block of the vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from objectives.losses.base import Prediction
from objectives.vocabulary import (
    Scores,
    add_gradients,
    first_column,
    for_each_block,
    not_finite,
    total,
)

# (carry, log p of a block [B, T, K], start, arrays of the tokens, block of arrays of the
# vocabulary) -> (carry, a [B, T, K], value [B, T]); see `expectation`.
Terms = Callable[..., tuple[Any, jax.Array, jax.Array]]


class _Static(NamedTuple):
    terms: Terms
    scores: Scores
    block_size: int
    axis: str | None


def expectation(
    terms: Terms,
    prediction: Prediction,
    logsumexp_BT: jax.Array,
    carry: Any,
    tokens: Any,
    vocabulary: Any,
    block_size: int,
    axis: str | None = None,
) -> jax.Array:
    """A loss of every token, with the gradient of -sum_v a_v log p_v in the logits z.

    a is not differentiated: d loss / d z_v = p_v sum(a) - a_v. No [B, T, V] array exists: `terms`
    gives a of one block, and the block's contribution to the loss; it is called again, block by
    block in the same order, in the backward pass. With a block size of 0 there is one block and no
    custom gradient: every mode of differentiation works, with a as a constant.

    Args:
      terms: (carry, log_p_BTK, start, tokens, vocabulary_K) -> (carry, a_BTK, value_BT).
      prediction: distribution p.
      logsumexp_BT: of its logits, as `token_statistics` gives it.
      carry: what `terms` gets for the first block, of this device's part of the vocabulary.
      tokens: tree of arrays that `terms` reads whole.
      vocabulary: tree of arrays [..., V] that `terms` reads a block of.
      block_size: columns per block; 0 is all at once.
      axis: of `token_statistics`; `start` counts from the first column of the whole vocabulary.

    Returns:
      [B, T] float32, differentiable in `prediction` only. A token whose cotangent is 0 contributes
      exactly 0.
    """
    static = _Static(terms, prediction.scores, block_size, axis)
    constants = jax.lax.stop_gradient((logsumexp_BT, carry, tokens, vocabulary))
    if not block_size:
        return _plain(static, prediction.hidden, prediction.head, constants)
    return _expectation(static, prediction.hidden, prediction.head, constants)


def _plain(static, hidden_BTD, head_DV, constants):
    """The loss as a constant, plus a term that is 0 and has the gradient."""
    scores, axis = static.scores, static.axis
    logsumexp_BT, carry, tokens, vocabulary = constants
    # Before any arithmetic: see `not_finite`.
    bad_BT = not_finite(scores, hidden_BTD, head_DV, axis)
    hidden_BTD = jnp.where(bad_BT[..., None], 0, hidden_BTD)
    logits_BTV = jnp.where(bad_BT[..., None], 0, scores.logits(hidden_BTD, head_DV))
    fixed_BTV = jax.lax.stop_gradient(logits_BTV)
    log_p_BTV = fixed_BTV - jnp.where(bad_BT, 0, logsumexp_BT)[..., None]
    first = first_column(head_DV, axis)
    _, a_BTV, value_BT = jax.lax.stop_gradient(
        static.terms(carry, log_p_BTV, first, tokens, vocabulary)
    )
    # log sum exp(z) = log sum p exp(z - sg[z]) + sg[log sum exp(z)], whose value is known.
    sums = jnp.sum(jnp.exp(log_p_BTV + (logits_BTV - fixed_BTV)), -1), a_BTV.sum(-1), value_BT
    dot_BT = jnp.sum(jnp.where(a_BTV != 0, a_BTV * (logits_BTV - fixed_BTV), 0.0), -1)
    sum_p_BT, total_BT, value_BT, dot_BT = total((*sums, dot_BT), axis)
    gradient_BT = total_BT * jnp.log(sum_p_BT) - dot_BT
    loss_BT = value_BT + (gradient_BT - jax.lax.stop_gradient(gradient_BT))
    return jnp.where(bad_BT, jnp.nan, loss_BT)


def _block_terms(static, hidden_BTD, head_DK, logsumexp_BT, carry, start, tokens, vocabulary_K):
    logits_BTK = static.scores.logits(hidden_BTD, head_DK)
    log_p_BTK = logits_BTK - logsumexp_BT[..., None]
    return logits_BTK, log_p_BTK, static.terms(carry, log_p_BTK, start, tokens, vocabulary_K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expectation(static, hidden_BTD, head_DV, constants):
    return _forward(static, hidden_BTD, head_DV, constants)[0]


def _forward(static, hidden_BTD, head_DV, constants):
    logsumexp_BT, carry, tokens, vocabulary = constants
    first = first_column(head_DV, static.axis)

    def add_block(sums, blocks, start):
        carry, value_BT, total_BT = sums
        head_DK, vocabulary_K = blocks
        _, _, (carry, a_BTK, block_BT) = _block_terms(
            static, hidden_BTD, head_DK, logsumexp_BT, carry, first + start, tokens, vocabulary_K
        )
        return carry, value_BT + block_BT, total_BT + a_BTK.sum(-1)

    zeros_BT = jnp.zeros_like(logsumexp_BT)
    _, *sums = for_each_block(
        (head_DV, vocabulary), static.block_size, add_block, (carry, zeros_BT, zeros_BT)
    )
    value_BT, total_BT = total(sums, static.axis)
    return value_BT, (hidden_BTD, head_DV, constants, total_BT)


def _backward(static, residuals, d_BT):
    hidden_BTD, head_DV, constants, total_BT = residuals
    logsumexp_BT, carry, tokens, vocabulary = constants
    first = first_column(head_DV, static.axis)
    live_BT = d_BT != 0
    hidden_BTD = jnp.where(live_BT[..., None], hidden_BTD, 0)

    def add_block(sums, blocks, start):
        carry, gradients = sums
        head_DK, vocabulary_K = blocks
        logits_BTK, log_p_BTK, (carry, a_BTK, _) = _block_terms(
            static, hidden_BTD, head_DK, logsumexp_BT, carry, first + start, tokens, vocabulary_K
        )
        dz_BTK = d_BT[..., None] * (jnp.exp(log_p_BTK) * total_BT[..., None] - a_BTK)
        block = static.scores.pull_back(hidden_BTD, head_DK, logits_BTK, dz_BTK, live_BT)
        return carry, add_gradients(gradients, block, start)

    zeros_BTD = jnp.zeros(hidden_BTD.shape, jnp.float32)
    _, (dhidden_BTD, dhead_DV) = for_each_block(
        (head_DV, vocabulary),
        static.block_size,
        add_block,
        (carry, (zeros_BTD, jnp.zeros_like(head_DV))),
    )
    dhidden_BTD = jnp.where(live_BT[..., None], dhidden_BTD, 0)
    return dhidden_BTD.astype(hidden_BTD.dtype), dhead_DV, None


_expectation.defvjp(_forward, _backward)
