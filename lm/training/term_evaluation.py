"""Every term of an objective on batches that nothing is trained on.

B rows, T tokens.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from lm.compression.phases import Quantized
from lm.data.layout import BATCH
from lm.data.pairs import Reading
from lm.model.interface import Model
from lm.references.sources import EMA
from lm.training.experiment import Experiment
from lm.training.forward import make_training_statistics, token_keys
from lm.training.gradients import gather_references
from lm.training.state import average_as_model
from lm.training.step import make_reference_models
from objectives import Objective

# (batch) -> {name of a term: (sum, denominator)}, float32 scalars
Measure = Callable[[Mapping[str, jax.Array]], dict[str, tuple[jax.Array, jax.Array]]]


def term_evaluation(
    run: Experiment,
    reading: Reading | None,
    stored: Collection[str],
    second_models: Mapping[str, Model],
    frozen: Any,
    say: Callable[[str], None],
) -> "TermEvaluation | None":
    """What evaluates the terms of a run's objective.

    None for the weighted mean of the losses of tokens, which has nothing to add to a validation
    loss, for a policy gradient, whose terms are of answers that are drawn, and, after a line that
    says why, where batches lack what the objective needs.

    Args:
      run: the run.
      reading: how the texts are read.
      stored: names of the references that are stored, with training documents.
      second_models: source of a reference -> its model.
      frozen: source of a reference -> what was trained of it.
      say: shows one line.
    """
    if run.config.objective.name == "weighted" or run.objective.advantages is not None:
        return None
    if why := _obstacle(run.objective, reading, stored):
        say(f"validation is without the terms of the objective: {why}")
        return None
    return TermEvaluation(run, second_models, frozen)


def _obstacle(objective: Objective, reading: Reading | None, stored: Collection[str]) -> str:
    known = (*BATCH, "keys", *(reading.keys if reading else ()), *objective.references)
    if missing := [key for key in objective.batch_keys if key not in known]:
        return f"these texts have no {' and '.join(missing)}"
    if stored:
        return f"{' and '.join(sorted(stored))} is stored for training documents only"
    return ""


class TermEvaluation:
    """Evaluates an objective with its references, in the phase that the model is in.

    Each phase is compiled once, when it is needed.

    Args:
      run: the run.
      second_models: source of a reference -> its model.
      frozen: source of a reference -> what was trained of it.
    """

    def __init__(self, run: Experiment, second_models: Mapping[str, Model], frozen: Any):
        self._run, self._frozen, self._compiled = run, frozen, {}
        self._second_models = second_models
        sources = {run.config.objective.references[name] for name in run.references()}
        self._compares_with_average = EMA in sources

    def __call__(self, state: Any) -> Measure:
        """The terms with the model of a train state.

        That is the moving average where there is one, unless this is what is compared with.
        """
        run = self._run
        usable, quantized = run.usable(state)
        others = dict(self._frozen)
        if self._compares_with_average:
            others[EMA] = average_as_model(run.model, state.ema)
            usable = usable._replace(params=state.trained.params, loss=state.trained.loss)
            if quantized:
                usable = usable._replace(scales=state.trained.scales)
        if quantized not in self._compiled:
            step = make_term_step(
                run.model,
                run.objective,
                run.config,
                run.quantized if quantized else None,
                self._second_models,
            )
            self._compiled[quantized] = jax.jit(step)
        compiled = self._compiled[quantized]
        return lambda batch: compiled(usable, batch, state.objective, state.step, others)


def make_term_step(
    model: Model,
    objective: Objective,
    config: ConfigDict,
    quantized: Quantized | None = None,
    second_models: Mapping[str, Model] | None = None,
) -> Callable[..., dict[str, tuple[jax.Array, jax.Array]]]:
    """(trained, batch, state of the objective, step, {source: what was trained}) -> terms.

    Sums and denominators over the batch, by name. Nothing is dropped out; a random loss draws as in
    a training step of the same number.
    """
    size = config.objective.block_size
    measure = make_training_statistics(model, size, objective, quantized, dropout=False)
    reference_models = make_reference_models(model, objective, config, quantized, second_models)

    def terms(trained, batch, state, step, others):
        if "keys" in objective.batch_keys:
            keys = token_keys(config.train.seed, step, batch["targets"].shape)
            batch = {**batch, "keys": keys}
        models = reference_models(trained, others)
        references = gather_references(objective.references, batch, models, 1)
        found, aux = measure(trained, batch, teachers={n: models[n] for n in objective.teachers})
        prepared = objective.prepare(found, aux, batch, references, state, step)
        values = objective.terms(found, aux, batch, prepared)
        return {name: (term.sum, term.denominator) for name, term in values.items()}

    return terms
