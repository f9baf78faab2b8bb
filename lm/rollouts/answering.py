"""Answers of the model that trains, on the mesh that it trains on, as texts of this process.

N rows over all processes, P tokens of the longest prompt, S of the longest answer.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm.compression.phases import Quantized
from lm.data.tokenizers import Tokenizer
from lm.model.trained import Trained
from lm.parallel.cross_process import of_all_shares
from lm.parallel.mesh import local_rows, put_batch, row_sharding
from lm.rollouts.problem_prompts import padded
from lm.rollouts.sampling import ends_of, make_answer
from lm.training.experiment import Experiment

# Keeps these keys apart from those of a training step, which folds its number in first: no run has
# a step of this number.
_ANSWERS = 0x616E7377


class Written(NamedTuple):
    """The answers to the prompts of this process.

    Attributes:
      tokens_NS: int32; the token that ends a text is its last one.
      lengths_N: tokens of each that were drawn, that one included.
      ended_N: whether an answer ended by itself.
      log_probability_NS, entropy_NS, divergence_NS, temperature_NS: see `lm.model.drawn.Measured`.
      texts: without the token that ends them.
      seconds: that drawing took.
      compiled: whether the program was compiled in them.
    """

    tokens_NS: np.ndarray
    lengths_N: np.ndarray
    ended_N: np.ndarray
    log_probability_NS: np.ndarray
    entropy_NS: np.ndarray
    divergence_NS: np.ndarray
    temperature_NS: np.ndarray
    texts: list[str]
    seconds: float
    compiled: bool


def of_all(mesh: Mesh, written: Written) -> Written:
    """The answers of all processes, but for their texts; all of them have to ask."""
    arrays = {name: x for name, x in written._asdict().items() if isinstance(x, np.ndarray)}
    whole = {
        name: of_all_shares(mesh, x.astype(np.float64)).reshape(-1, *x.shape[1:]).astype(x.dtype)
        for name, x in arrays.items()
    }
    return written._replace(**whole)


def answer_keys(seed: int, step: jax.Array, attempt: jax.Array, rows: int) -> jax.Array:
    """A random key a row, [N], that depends on seed, step, attempt and row alone."""
    key = jax.random.fold_in(jax.random.key(seed), _ANSWERS)
    key = jax.random.fold_in(jax.random.fold_in(key, step), attempt)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


class Answering:
    """Draws answers; a program is compiled for each P that is asked for, in each phase.

    Args:
      built: the run.
      tokenizer: of its text.
      temperature: that logits are divided by; 0 takes the most likely token.
      top_p: share of the probability that may be drawn from.
      group: rows of a group, for their divergence; 0 leaves it out.
      rounding: grids that the weights are put on first, in place of those of training.
      temper: see `Objective.temper`; None draws all tokens at the temperature.
    """

    def __init__(
        self,
        built: Experiment,
        tokenizer: Tokenizer,
        *,
        temperature: float,
        top_p: float = 1.0,
        group: int = 0,
        rounding: Quantized | None = None,
        temper: Callable[[Any, jax.Array], jax.Array] | None = None,
    ):
        self._built, self._tokenizer, self._ends = built, tokenizer, ends_of(tokenizer)
        self._rounding, self._temper = rounding, temper
        self._options = {"temperature": temperature, "top_p": top_p, "group": group}
        self._programs, self._compiled = {}, set()

    def __call__(
        self,
        trained: Trained,
        quantized: bool,
        prompts: Sequence[np.ndarray],
        room: int,
        step: int,
        attempt: int = 0,
        carried: Any = (),
    ) -> Written:
        """Answers the prompts; all processes have to ask.

        Args:
          trained: what is trained.
          quantized: whether the model on its grids answers.
          prompts: ids of each prompt of this process's share, as many in every share.
          room: P, the same in every share.
          step, attempt: what random draws depend on besides the seed.
          carried: state of the objective, for `temper`.
        """
        mesh = self._built.mesh
        if quantized not in self._programs:
            self._programs = {quantized: self._program(quantized)}
            self._compiled = set()
        new = (len(prompts), room) not in self._compiled
        self._compiled.add((len(prompts), room))
        # What is under way on the device, such as a training step, is not part of the time.
        jax.block_until_ready(trained)
        begin = time.perf_counter()
        asked = put_batch(mesh, dict(padded(prompts, room)), row_sharding(mesh))
        numbers, carried = (np.int32(step), np.int32(attempt)), carried if self._temper else ()
        arrays = asked["tokens"], asked["mask"]
        found = self._programs[quantized](trained, *arrays, *numbers, carried)
        tokens_NS, lengths_N, measured = jax.tree.map(lambda x: local_rows(mesh, x), found)
        seconds = time.perf_counter() - begin
        last_N = np.take_along_axis(tokens_NS, lengths_N[:, None] - 1, axis=1)[:, 0]
        ended_N = np.isin(last_N, self._ends)
        kept_N = lengths_N - ended_N
        texts = [
            self._tokenizer.decode(ids[:count])
            for ids, count in zip(tokens_NS, kept_N, strict=True)
        ]
        return Written(tokens_NS, lengths_N, ended_N, *measured, texts, seconds, new)

    def _program(self, quantized: bool):
        built, rounding = self._built, self._rounding
        answer = make_answer(
            built.model,
            rounding or (built.quantized if quantized else None),
            tokens=built.config.rollouts.tokens,
            ends=self._ends,
            **self._options,
        )

        def program(trained, tokens_NP, mask_NP, step, attempt, carried):
            if rounding:
                trained = trained._replace(scales=rounding.first_scales(trained.params))
            keys_N = answer_keys(built.config.train.seed, step, attempt, len(tokens_NP))
            temper = functools.partial(self._temper, carried) if self._temper else None
            return answer(trained, tokens_NP, mask_NP, keys_N, temper)

        return jax.jit(program, out_shardings=row_sharding(built.mesh))
