"""What an objective does to the tokens of a batch that is looked at, and not trained on.

B rows, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import InputError
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.references.sources import EMA
from lm.training.experiment import Experiment
from lm.training.forward import make_training_statistics
from lm.training.gradients import gather_references
from lm.training.state import TrainState, average_as_model
from lm.training.step import make_reference_models
from objectives.cross_entropy import TokenStatistics
from objectives.terms import minimise


class Seen(NamedTuple):
    """What the terms of an objective are made of.

    Attributes:
      statistics: of the tokens, [B, T].
      aux: taps and further heads.
      references: arrays [B, T] by name.
    """

    statistics: TokenStatistics
    aux: Mapping[str, Any]
    references: Mapping[str, jax.Array]

    @property
    def log_ratio(self) -> jax.Array:
        """log p - log p_reference, or log p where nothing is compared with, [B, T]."""
        compared = self.references["reference_nll"] if self.is_compared else 0.0
        return self.statistics.log_probability + compared

    @property
    def is_compared(self) -> bool:
        """Whether log-ratios are against a reference."""
        return "reference_nll" in self.references


Look = Callable[[Mapping[str, jax.Array]], Seen]
# (seen, batch) -> (loss, {name: value}), scalars
Terms = Callable[[Seen, Mapping[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]


def make_look(
    run: Experiment,
    state: TrainState,
    second_models: Mapping[str, tuple[Model, Trained]] | None = None,
) -> tuple[Look, Terms]:
    """Functions that look at a batch as a train step of a run would: (batch) -> `Seen`, and terms.

    As in training the model is not its moving average and is quantized when the run is in that
    phase, but nothing is dropped out. The objective starts from its initial state. `second_models`
    maps sources of `objective.references` to what they hold. The second function has the values of
    all terms, and what `prepare` reports.

    Raises:
      InputError: the objective needs random keys.
    """
    config, objective = run.config, run.objective
    if "keys" in objective.batch_keys:
        raise InputError(
            f"objective.name={config.objective.name!r} draws at random in every step, so that there"
            " is no one value to show"
        )
    quantized = run.quantized if run.usable(state)[1] else None
    size, second_models = config.objective.block_size, second_models or {}
    measure = make_training_statistics(run.model, size, objective, quantized, dropout=False)
    models = {source: model for source, (model, _) in second_models.items()}
    reference_models = make_reference_models(run.model, objective, config, quantized, models)
    others = {source: trained for source, (_, trained) in second_models.items()}
    if state.ema:
        others[EMA] = average_as_model(run.model, state.ema)

    @jax.jit
    def look(trained, others, batch):
        known = reference_models(trained, others)
        found, aux = measure(trained, batch, teachers={n: known[n] for n in objective.teachers})
        return Seen(found, aux, gather_references(objective.references, batch, known, 1))

    @jax.jit
    def terms(seen, batch):
        step = jnp.asarray(state.step)
        prepared = objective.prepare(*seen[:2], batch, seen.references, objective.init(), step)
        loss, values = minimise(objective.terms(*seen[:2], batch, prepared))
        return loss, {**prepared.metrics, **values}

    return lambda batch: look(state.trained, others, batch), terms


def pulls(
    terms: Terms, seen: Seen, batch: Mapping[str, jax.Array], count: int
) -> tuple[np.ndarray, dict[str, float]]:
    """-count dL / d log p of every token, [B, T], and the terms of the batch by name.

    L is the loss of all tokens together. Positive where a step raises the log-probability of a
    token, negative where it lowers it; 0 where the objective does not look, and at prompts.

    Args:
      terms: of `make_look`.
      seen: what its first function returned.
      batch: of which batch.
      count: records or answers in it, so that the size of a pull does not depend on how many there
        are.
    """

    def of(statistics):
        return terms(seen._replace(statistics=statistics), batch)

    slopes, values = jax.grad(of, has_aux=True)(seen.statistics)
    pull_BT = count * (slopes.nll - slopes.log_probability)
    return np.asarray(pull_BT), {name: float(x) for name, x in values.items()}
