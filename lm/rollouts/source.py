"""The source of batches of on-policy distillation (GKD, arXiv 2306.13649, algorithm 1).

B rows, T tokens of a row, P tokens of the longest prompt, S of the longest completion.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lm.data.layout import BATCH, PADDING
from lm.data.problems import problems
from lm.errors import InputError
from lm.parallel.mesh import batch_sharding, replicated
from lm.rollouts.judge import Judge
from lm.rollouts.policy_source import PolicySource
from lm.rollouts.prompts import Prompts, check_prompts, read_prompts
from lm.rollouts.sampling import Completions, ends_of, make_complete, row_keys
from lm.training.experiment import Data, Experiment, reading_of
from lm.training.sources import GrainSource, Source, Spent
from lm.training.state import TrainState


def make_source(
    built: Experiment,
    data: Data,
    dataset: grain.IterDataset | None,
    stored: Mapping[str, Any],
    judge: Judge | None = None,
    say: Callable[[str], None] = print,
) -> Source:
    """The source of batches of a run: its data, and with rollouts.share the model's own text.

    For a policy gradient it is answers of the model to the problems of the data.

    Args:
      built: functions of the config.
      data: corpora and tokenizer.
      dataset: batches of the data, of `lm.training.experiment.train_batches`; a policy gradient
        needs none.
      stored: what a batch gets of stored references, by name.
      judge: of the answers of a policy gradient.
      say: shows one line.

    Raises:
      InputError: there is no text of its own to be had.
    """
    c = built.config.rollouts
    if built.objective.advantages is not None:
        if stored:
            raise InputError(
                f"objective.name={built.config.objective.name!r}: stored scores "
                f"({', '.join(sorted(stored))}) are of the text of the data; valid: references "
                "that are models"
            )
        return PolicySource(built, problems(data.train), data.tokenizer, judge, say)
    if c.share:
        if stored:
            raise InputError(
                f"rollouts.share={c.share}: stored scores ({', '.join(sorted(stored))}) are of the "
                "text of the data; valid: references that are models"
            )
        check_prompts(data.train, data.tokenizer, c.prompt_tokens)
    reading = reading_of(built.config, data.train)
    source = GrainSource(dataset, built.mesh, (*stored, *(reading.keys if reading else ())))
    return OnPolicySource(source, built, ends_of(data.tokenizer)) if c.share else source


class OnPolicySource:
    """The batches of another source, of which some have the student's answers under their prompts.

    In a step that `is_on_policy` each row is one prompt of the row that the data has and what the
    model, with its parameters before the step, writes after it; all other batches are as they come.
    No gradient passes through the drawing. In the quantized phase the model on its grids writes,
    with adapters the model with them.

    There is no state besides that of the data: what is drawn depends on the seed, the step and the
    train state alone.
    """

    def __init__(self, source: Source, built: Experiment, ends: tuple[int, ...]):
        self.keys, self.metrics, self.spent = source.keys, {}, Spent()
        self._source, self._built, self._ends = source, built, ends
        self._rollouts: dict[bool, Callable[..., Any]] = {}

    def next(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        """The batch of a step: of the data, or of the model's own text."""
        batch, config = self._source.next(step, state), self._built.config
        drawn = is_on_policy(config.train.seed, step, config.rollouts.share)
        self.metrics = {"on_policy": np.float32(drawn)}
        if not drawn:
            return batch
        quantized = step >= self._built.phases.switch
        if quantized not in self._rollouts:
            self._rollouts = {quantized: make_rollout(self._built, self._ends, quantized)}
        batch, length = self._rollouts[quantized](state.trained, batch, np.int32(step))
        self.metrics["sampled_tokens"] = length
        return batch

    def samples(self) -> str:
        """Nothing: a sample is drawn for it."""
        return ""

    def get_state(self) -> dict[str, Any]:
        """That of the data."""
        return self._source.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes back to where the data was."""
        self._source.set_state(state)

    def close(self) -> None:
        """Closes the source of the data."""
        self._source.close()


def is_on_policy(seed: int, step: int, share: float) -> bool:
    """Whether the batch of a step is the model's own text: with probability `share`, GKD's lambda.

    Decided by seed and step alone, so that a resumed run and all processes decide the same.
    """
    return bool(np.random.default_rng((seed, step)).random() < share)


def make_rollout(built: Experiment, ends: tuple[int, ...], quantized: bool) -> Callable[..., Any]:
    """(trained, batch, step) -> (batch of the model's own text, mean tokens drawn), jitted."""
    c, length = built.config.rollouts, built.config.data.sequence_length
    complete = make_complete(
        built.model,
        built.objective.loss,
        built.quantized if quantized else None,
        tokens=c.tokens,
        temperature=c.temperature,
        ends=ends,
        top_p=c.top_p,
    )

    def rollout(trained, batch, step):
        keys_B = row_keys(built.config.train.seed, step, len(batch["tokens"]))
        keys_2B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
        prompts = read_prompts(batch, keys_2B[0], length - c.tokens, c.prompt_tokens)
        completions = complete(trained, prompts, keys_2B[1])
        found_B = prompts.found_B.astype(jnp.float32)
        drawn = jnp.sum(found_B * completions.lengths_B)
        return make_rows(prompts, completions, length), drawn / jnp.maximum(jnp.sum(found_B), 1)

    shardings = dict.fromkeys(BATCH, batch_sharding(built.mesh))
    return jax.jit(rollout, out_shardings=(shardings, replicated(built.mesh)))


def make_rows(prompts: Prompts, completions: Completions, length: int) -> dict[str, jax.Array]:
    """A batch of one prompt with its completion a row, then padding; see `lm.data.batches`.

    The weight is 1 where the target was drawn, the token that ends the text included, and 0
    elsewhere. Bytes are not known: num_bytes is 0. A row without a prompt is padding.

    Args:
      prompts: P tokens a row.
      completions: S tokens a row.
      length: T, at least P + S - 1.
    """
    text_BC = jnp.concatenate([prompts.tokens_BP, completions.tokens_BS], axis=1)
    begin_B = prompts.tokens_BP.shape[1] - jnp.sum(prompts.mask_BP, axis=1)
    place_T = jnp.arange(length)

    def shifted(by):
        place_BT = jnp.minimum(begin_B[:, None] + place_T + by, text_BC.shape[1] - 1)
        return jnp.take_along_axis(text_BC, place_BT, axis=1)

    last_B = prompts.tokens_BP.shape[1] - begin_B - 1  # Its target is the first that was drawn.
    live_BT = prompts.found_B[:, None] & (place_T < (last_B + completions.lengths_B)[:, None])
    drawn_BT = live_BT & (place_T >= last_B[:, None])
    positions_BT = jnp.broadcast_to(place_T, live_BT.shape)
    rows = {
        "tokens": shifted(0),
        "targets": shifted(1),
        "weights": drawn_BT,
        "num_bytes": jnp.zeros_like(positions_BT),
        "segment_ids": jnp.ones_like(positions_BT),
        "positions": positions_BT,
        "sample_ids": jnp.broadcast_to(prompts.sample_ids_B[:, None], live_BT.shape),
        "sample_positions": prompts.sample_positions_B[:, None] + positions_BT,
    }
    return {
        name: jnp.where(live_BT, x, PADDING.get(name, 0)).astype(BATCH[name])
        for name, x in rows.items()
    }
