"""From the losses of tokens to the loss of a batch.

B rows, T tokens, P answers of a row. All map (answers of the whole batch, advantages [B, T]) to
(factors [B, T], denominator): the loss is sum(factor * loss of a token) / denominator, whatever
rows and micro-batches its tokens are in. N is the number of answers, n_i the length of one, d the
weight of the data, 1 at what was drawn.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from objectives.policy.answers import Answers, answer_sums, to_tokens
from objectives.segments import sums_by_number

# (answers, advantages [B, T]) -> (factors [B, T], denominator)
Aggregation = Callable[[Answers, jax.Array], tuple[jax.Array, jax.Array]]


def token_mean(answers: Answers, advantages_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sum l / sum n_i: every token counts the same (DAPO)."""
    del advantages_BT
    return answers.weights_BT, jnp.sum(answers.weights_BT)


def sequence_mean(answers: Answers, advantages_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(1 / N) sum_i (1 / n_i) sum_t l: every answer counts the same (GRPO)."""
    del advantages_BT
    sums_BP = _lengths(answers)
    factors_BT = to_tokens(answers, 1 / jnp.where(sums_BP > 0, sums_BP, 1.0))
    return answers.weights_BT * factors_BT, _number(answers)


def sequence_sum(answers: Answers, advantages_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(1 / N) sum_i sum_t l: the log-probability of an answer is a sum over its tokens."""
    del advantages_BT
    return answers.weights_BT, _number(answers)


def fixed_length(length: int = 0) -> Aggregation:
    """(1 / (N L)) sum_i sum_t l: `sequence_sum` over a constant (Dr. GRPO, arXiv 2503.20783).

    Args:
      length: L, at least 1; 0 is the length T of a row.
    """

    def aggregation(answers, advantages_BT):
        factors_BT, number = sequence_sum(answers, advantages_BT)
        return factors_BT, number * (length or factors_BT.shape[1])

    return aggregation


def sign_balanced(answers: Answers, advantages_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sum over signs k of (N_k / N) * token mean over the answers of sign k: arXiv 2605.04077.

    The sign of an answer is that of the sum of its advantages; those of 0 are a third class, for
    what else is minimised of their tokens.
    """
    signs_BP = jnp.sign(answer_sums(answers, advantages_BT))
    signs_BT = to_tokens(answers, signs_BP)
    sums_BP = _lengths(answers)
    factors_BT = jnp.zeros_like(answers.weights_BT)
    for sign in (-1, 0, 1):
        number = jnp.sum((signs_BP == sign) & (sums_BP > 0), dtype=jnp.float32)
        weights_BT = jnp.where(signs_BT == sign, answers.weights_BT, 0.0)
        total = jnp.sum(weights_BT)
        factors_BT += weights_BT * number / jnp.where(total > 0, total, 1.0)
    return factors_BT, _number(answers)


def make_aggregation(name: str, length: int = 0) -> Aggregation:
    """The aggregation of a name in `AGGREGATIONS`; the length is that of `fixed_length`."""
    named = {
        "token_mean": token_mean,
        "sequence_mean": sequence_mean,
        "sequence_sum": sequence_sum,
        "fixed_length": fixed_length(length),
        "sign_balanced": sign_balanced,
    }
    return named[name]


def _lengths(answers: Answers) -> jax.Array:
    """sum(d) over each answer, [B, P]: of the weights, which a method may have set to 0."""
    ones_BT = jnp.ones_like(answers.weights_BT)
    return sums_by_number(answers.numbers_BT, answers.weights_BT, ones_BT)


def _number(answers: Answers) -> jax.Array:
    return jnp.sum(_lengths(answers) > 0, dtype=jnp.float32)


AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "fixed_length", "sign_balanced")
