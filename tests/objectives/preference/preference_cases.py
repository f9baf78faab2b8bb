"""Answers as lists of numbers, the rows that hold them, and objectives on them.

P pairs, B rows, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from objectives.cross_entropy import TokenStatistics
from objectives.objective import Objective
from objectives.terms import minimise

PROMPT, LENGTH, WIDTH = 2, 40, 5
LENGTHS = ((2, 3), (4, 1), (1, 2), (3, 3))
# Pairs of each row, by number.
ROWS = ((0, 1), (2,), (3,))
STORED = (
    "reference_nll",
    "reward_nll",
    "better_nll",
    "worse_nll",
    "contrast_probability",
    "desirable_probability",
)


class Answers(NamedTuple):
    """One array a chosen, a rejected and a mismatched answer, of numbers of its tokens."""

    chosen: list
    rejected: list
    mismatched: list

    def map(self, function):
        """The function of every number."""
        return Answers(*([function(x) for x in side] for side in self))


def draw(seed, lengths=LENGTHS, low=-3.0, high=-0.05) -> Answers:
    """Numbers of the tokens of pairs; the mismatched answers are as long as the chosen ones."""
    rng = np.random.default_rng(seed)
    sides = ([n for n, _ in lengths], [n for _, n in lengths], [n for n, _ in lengths])
    return Answers(*([rng.uniform(low, high, n) for n in side] for side in sides))


class Case(NamedTuple):
    """The policy's log-probabilities, and all that can be compared with, by name."""

    log_p: Answers
    known: dict[str, Answers]


def case(seed=0, lengths=LENGTHS) -> Case:
    """A case with every reference; "divergence" is that of a teacher."""
    known = {name: draw(seed + 1 + i, lengths).map(np.abs) for i, name in enumerate(STORED)}
    for name in STORED[-2:]:
        known[name] = draw(seed + 20, lengths, 0.05, 0.95)
    known["divergence"] = draw(seed + 30, lengths, 0.0, 2.0)
    return Case(draw(seed, lengths), known)


def segments(lengths, rows, mismatched, prompt=PROMPT):
    """(row, first target, number of targets, kind, pair, number in the row) of every answer."""
    for row, pairs in enumerate(rows):
        start = prompt
        for number, pair in enumerate(pairs):
            kinds = ("chosen", "rejected", "mismatched") if mismatched else ("chosen", "rejected")
            for kind in kinds:
                size = lengths[pair][1 if kind == "rejected" else 0]
                yield row, start, size, kind, pair, number
                start += size + prompt


def place(answers: Answers, rows=ROWS, mismatched=False, other=np.nan, prompt=PROMPT) -> np.ndarray:
    """The numbers at their places, [B, T], and `other` elsewhere."""
    lengths = [(len(a), len(b)) for a, b in zip(answers.chosen, answers.rejected, strict=True)]
    array = np.full((len(rows), LENGTH), other, np.float32)
    for row, start, size, kind, pair, _ in segments(lengths, rows, mismatched, prompt):
        array[row, start : start + size] = getattr(answers, kind)[pair]
    return array


def make_batch(
    lengths=LENGTHS, rows=ROWS, mismatched=False, prompt=PROMPT, length=LENGTH
) -> dict[str, np.ndarray]:
    """A batch whose prompts and padding have weight 0."""
    found = segments(lengths, rows, mismatched, prompt)
    shape = len(rows), length
    batch = {
        "weights": np.zeros(shape, np.float32),
        "pair_ids": np.full(shape, -1, np.int32),
        "sides": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "mismatched_ids": np.full(shape, -1, np.int32),
        "tokens": np.arange(np.prod(shape), dtype=np.int32).reshape(shape),
        "targets": 1 + np.arange(np.prod(shape), dtype=np.int32).reshape(shape),
    }
    for segment, (row, start, size, kind, _, number) in enumerate(found, 1):
        whole = row, slice(start - prompt, start + size)
        batch["segment_ids"][whole] = segment
        batch["weights"][row, start : start + size] = 1
        if kind == "mismatched":
            batch["mismatched_ids"][whole] = number
        else:
            batch["pair_ids"][whole] = number
            batch["sides"][whole] = 1 if kind == "chosen" else -1
    return batch


class Inputs(NamedTuple):
    """What an objective reads: the statistics' arrays, the batch, references, aux and state."""

    log_p: jax.Array
    divergence: jax.Array
    batch: dict[str, jax.Array]
    references: dict[str, jax.Array]
    aux: dict[str, jax.Array]
    state: object = ()


def make_inputs(objective: Objective, one: Case, rows=ROWS, other=np.nan, prompt=PROMPT) -> Inputs:
    """The case in rows, `other` at what has no weight, with random hidden states."""
    lengths = [(len(a), len(b)) for a, b in zip(one.log_p.chosen, one.log_p.rejected, strict=True)]
    mismatched = "mismatched_ids" in objective.batch_keys
    batch = make_batch(lengths, rows, mismatched, prompt)
    log_p = place(one.log_p, rows, mismatched, other, prompt)
    placed = {name: place(x, rows, mismatched, other, prompt) for name, x in one.known.items()}
    live = batch["weights"] != 0
    # The states of an answer depend on the answer, wherever it stands.
    states = np.sin(np.arange(1, WIDTH + 1) * 10 * np.where(live, log_p, 0)[..., None])
    states = np.where(live[..., None], states, other).astype(np.float32)
    names = {*objective.taps, *(f"reference_{name}" for name in objective.reference_taps)}
    return jax.tree.map(
        jnp.asarray,
        Inputs(
            log_p,
            placed["divergence"],
            batch,
            {name: placed[name] for name in objective.references},
            {name: states for name in names},
            objective.init(),
        ),
    )


def statistics(objective: Objective, log_p, divergence) -> TokenStatistics:
    """Statistics as a model's: what a token's loss is besides its nll, there is for some alone."""
    other = None if objective.loss.is_nll else divergence
    return TokenStatistics(-log_p, log_p, log_p, log_p, other)


def run(objective: Objective, x: Inputs):
    """((value, (terms, state)), d value / d (log_p, divergence)), compiled once an objective."""
    if id(objective) not in _COMPILED:
        # With the objective, whose id would else become that of another one.
        _COMPILED[id(objective)] = objective, jax.jit(_make_run(objective))
    return _COMPILED[id(objective)][1](x)


_COMPILED = {}


def _make_run(objective):
    def minimised(differentiated, x):
        found = statistics(objective, *differentiated)
        seen = (found, x.aux) if objective.whole_batch else (None, {})
        prepared = objective.prepare(*seen, x.batch, x.references, x.state, 0)
        value, terms = minimise(objective.terms(found, x.aux, x.batch, prepared))
        return value, ({**terms, **prepared.metrics}, prepared.state)

    grads = jax.value_and_grad(minimised, has_aux=True)
    return lambda x: grads((x.log_p, x.divergence), x)
