"""What a preference objective makes of given records: log-ratios and pulls, token by token.

R rows, one record each; T tokens of a row.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.documents import Document
from lm.data.pairs import Encoder, Reading, encode_record, row_of_records
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.references.sources import EMA
from lm.training.experiment import Experiment
from lm.training.forward import make_training_statistics
from lm.training.gradients import gather_references
from lm.training.state import TrainState, average_as_model
from lm.training.step import make_reference_models
from objectives.terms import minimise


class PairInspection(NamedTuple):
    """Records of preference data, each in a row of its own; float32 or int32 arrays [R, T].

    Attributes:
      documents: the records that the objective can use.
      batch: the rows as a batch.
      nll: of every token, nats.
      log_ratio: log p - log p_reference, or log p where nothing is compared with.
      pull: -N dL / d log p of every token, with the loss L of all N records together: how strongly
        a step raises its log-probability. Negative where it is lowered; 0 where the objective does
        not look, and at prompts.
      compared: whether log-ratios are against a reference.
      terms: of each record alone, by name, [R].
      metrics: terms of all records together, by name.
    """

    documents: list[Document]
    batch: dict[str, np.ndarray]
    nll: np.ndarray
    log_ratio: np.ndarray
    pull: np.ndarray
    compared: bool
    terms: dict[str, np.ndarray]
    metrics: dict[str, float]


def inspect_pairs(
    run: Experiment,
    state: TrainState,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    reading: Reading,
    second_models: Mapping[str, tuple[Model, Trained]] | None = None,
) -> PairInspection:
    """Looks at records as a train step of a run would, were they its batch.

    As in training the model is not its moving average and is quantized when the run is in that
    phase, but nothing is dropped out. The objective starts from its initial state. `second_models`
    maps sources of `objective.references` to what they hold.

    Raises:
      InputError: the objective can use none of the records, or needs random keys.
    """
    config, objective = run.config, run.objective
    if "keys" in objective.batch_keys:
        raise InputError(
            f"objective.name={config.objective.name!r} draws at random in every step, so that there"
            " is no one value to show"
        )
    usable, rows = _rows(documents, tokenizer, reading, config.data.sequence_length)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    quantized = run.quantized if run.usable(state)[1] else None
    size, second_models = config.objective.block_size, second_models or {}
    measure = make_training_statistics(run.model, size, objective, quantized, dropout=False)
    models = {source: model for source, (model, _) in second_models.items()}
    reference_models = make_reference_models(run.model, objective, config, quantized, models)
    others = {source: trained for source, (_, trained) in second_models.items()}
    if state.ema:
        others[EMA] = average_as_model(run.model, state.ema)

    @jax.jit
    def look(trained, others, row):
        """(statistics, aux, references) of one row, [1, T]."""
        known = reference_models(trained, others)
        found, aux = measure(trained, row, teachers={n: known[n] for n in objective.teachers})
        return found, aux, gather_references(objective.references, row, known, 1)

    @jax.jit
    def terms(found, aux, batch, references):
        """(loss, terms) of the rows together."""
        step = jnp.asarray(state.step)
        prepared = objective.prepare(found, aux, batch, references, objective.init(), step)
        return minimise(objective.terms(found, aux, batch, prepared))

    seen, alone = [], []
    for r in range(len(rows)):
        row = {name: jnp.asarray(x[r : r + 1]) for name, x in batch.items()}
        found, aux, references = look(state.trained, others, row)
        seen.append((found, aux, references))
        alone.append(terms(found, aux, row, references)[1])
    found, aux, references = jax.tree.map(lambda *x: jnp.concatenate(x), *seen)
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    slopes, metrics = jax.grad(terms, has_aux=True)(found, aux, arrays, references)
    pull_RT = len(rows) * (slopes.nll - slopes.log_probability)
    compared = "reference_nll" in references
    ratio_RT = found.log_probability + (references["reference_nll"] if compared else 0.0)
    return PairInspection(
        usable,
        batch,
        np.asarray(found.nll),
        np.asarray(ratio_RT),
        np.asarray(pull_RT),
        compared,
        {name: np.array([float(one[name]) for one in alone]) for name in alone[0]},
        {name: float(x) for name, x in metrics.items()},
    )


def _rows(
    documents: Sequence[Document], tokenizer: Tokenizer, reading: Reading, length: int
) -> tuple[list[Document], list[dict[str, np.ndarray]]]:
    """The records that can be used, and a row of each."""
    encode = Encoder(documents, tokenizer, reading, length, 0, {})
    usable, rows = [], []
    for numbered in enumerate(documents):
        record = encode(numbered)
        if record is not None:
            usable.append(numbered[1])
            rows.append(row_of_records([record], length))
    if not rows:
        reasons = Counter(
            encode_record(documents, index, tokenizer, reading, length)[1]
            for index in range(len(documents))
        )
        raise InputError(
            f"{reading.user} with data.sequence_length={length} can use none of the records: "
            + ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        )
    return usable, rows
