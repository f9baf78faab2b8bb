"""What the losses of single answers have in common, each of them wanted or unwanted.

B rows, T tokens, P answers of a side in a row (see `objectives.preference.answers`). Pairs serve as
well: each is an answer of either side.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from objectives.preference import base
from objectives.preference.answers import Sides, are_there, lengths, pair_sums
from objectives.terms import Term


class Answers(NamedTuple):
    """What a loss reads of the answers; sides of float32 [B, P], 0 where there is no answer.

    Attributes:
      log_p: sum(d log p), nats.
      log_ratio: sum(d (log p - log p_reference)); without a reference as `log_p`.
      lengths: sum(d), and 1 where there is no answer.
      there: booleans, whether there is an answer.
    """

    log_p: Sides
    log_ratio: Sides
    lengths: Sides
    there: Sides


def read_answers(batch: Mapping[str, jax.Array], statistics: Any, ratio_BT: jax.Array) -> Answers:
    """The sums over the answers of a batch; `ratio_BT` are the log-ratios of its tokens."""
    there = are_there(batch)
    return Answers(
        pair_sums(batch, statistics.log_probability),
        pair_sums(batch, ratio_BT),
        _where(there, lengths(batch), 1.0),
        there,
    )


def totals(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The denominators of a whole batch: `base.totals`, and the answers of each side."""
    there = are_there(batch)
    counts = (jnp.sum(x_BP, dtype=jnp.float32) for x_BP in there)
    return base.totals(batch) | dict(zip(("chosen", "rejected"), counts, strict=True))


def over_answers(answers: Answers, values: Sides) -> Sides:
    """The sums over the answers at hand, a scalar a side."""
    return Sides(*map(jnp.sum, _where(answers.there, values, 0.0)))


def answer_metrics(
    answers: Answers, rewards: Sides, total: Mapping[str, jax.Array]
) -> dict[str, Term]:
    """What is reported of every objective of single answers: means over the answers of a side."""
    found = {}
    for name, values in (("reward", rewards), ("log_probability", answers.log_p)):
        sums = over_answers(answers, values)._asdict().items()
        found |= {f"{name}_{side}": Term(x, total[side], 0.0) for side, x in sums}
    return found


def _where(there: Sides, values: Sides, other: float) -> Sides:
    pairs = zip(there, values, strict=True)
    return Sides(*(jnp.where(there_BP, x_BP, other) for there_BP, x_BP in pairs))
