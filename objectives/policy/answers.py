"""Where the drawn answers of a batch are.

B rows, T tokens, P answers of a row: P = T, a slot for every segment that a row can have.

One segment of a row is a prompt with one answer that was drawn for it. Several can share a row, and
none is in two rows: every sum over an answer is a sum within a row, which neither micro-batches nor
devices split.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from objectives.segments import running_sums, spread_by_number, sums_by_number


class Answers(NamedTuple):
    """The answers of a batch.

    Attributes:
      numbers_BT: int32, the number of a token's segment in its row, from 0; -1 in the padding.
      live_BT: whether a token is a target that was drawn.
      weights_BT: float32, d, the weight of the data; 0 where `live_BT` is False.
      lengths_BP: float32, the number of drawn targets of each answer, 0 where there is none.
      targets_BT: int32, the drawn tokens.
    """

    numbers_BT: jax.Array
    live_BT: jax.Array
    weights_BT: jax.Array
    lengths_BP: jax.Array
    targets_BT: jax.Array

    @property
    def there_BP(self) -> jax.Array:
        """Which slots hold an answer."""
        return self.lengths_BP > 0

    @property
    def number(self) -> jax.Array:
        """How many answers there are, a float32 scalar."""
        return jnp.sum(self.there_BP, dtype=jnp.float32)

    @property
    def tokens(self) -> jax.Array:
        """How many drawn targets there are, a float32 scalar."""
        return jnp.sum(self.live_BT, dtype=jnp.float32)


def find_answers(batch: Mapping[str, jax.Array]) -> Answers:
    """The answers of a batch, by its "segment_ids" and "weights"."""
    weights_BT, numbers_BT = batch["weights"], batch["segment_ids"] - 1
    live_BT = (weights_BT != 0) & (numbers_BT >= 0)
    ones_BT = live_BT.astype(jnp.float32)
    return Answers(
        numbers_BT,
        live_BT,
        jnp.where(live_BT, weights_BT, 0.0),
        sums_by_number(numbers_BT, ones_BT, ones_BT),
        batch["targets"],
    )


def select(answers: Answers, values_BT: jax.Array) -> jax.Array:
    """The values of drawn targets, and 0 elsewhere, where an array may hold anything."""
    return jnp.where(answers.live_BT, values_BT, 0.0)


def answer_sums(answers: Answers, values_BT: jax.Array) -> jax.Array:
    """The sum over the drawn targets of each answer, [B, P]."""
    return sums_by_number(answers.numbers_BT, answers.live_BT.astype(jnp.float32), values_BT)


def answer_means(answers: Answers, values_BT: jax.Array) -> jax.Array:
    """The mean over the drawn targets of each answer, [B, P]; 0 where there is none."""
    return answer_sums(answers, values_BT) / jnp.maximum(answers.lengths_BP, 1.0)


def to_tokens(answers: Answers, values_BP: jax.Array) -> jax.Array:
    """Gives every drawn target the value of its answer, [B, T]; 0 elsewhere."""
    return select(answers, spread_by_number(answers.numbers_BT, values_BP))


def sums_so_far(answers: Answers, values_BT: jax.Array) -> jax.Array:
    """The sum over the drawn targets of the answer up to and with each one, [B, T]."""
    return select(answers, running_sums(answers.numbers_BT, select(answers, values_BT)))


def sums_from_here(answers: Answers, values_BT: jax.Array) -> jax.Array:
    """The sum over the drawn targets of the answer from each one to the last, [B, T]."""
    values_BT = select(answers, values_BT)
    total_BT = to_tokens(answers, answer_sums(answers, values_BT))
    return select(answers, total_BT - sums_so_far(answers, values_BT) + values_BT)


def places(answers: Answers) -> jax.Array:
    """The place of each drawn target in its answer, from 1, [B, T] float32; 0 elsewhere."""
    return sums_so_far(answers, jnp.ones_like(answers.weights_BT))
