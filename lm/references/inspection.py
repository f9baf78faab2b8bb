"""What a weighting makes of given texts: statistics, references and weights, token by token.

R rows, T tokens of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.data.documents import Document
from lm.data.layout import add_fields, encode_document, make_row
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.references.sources import BASE, EMA
from lm.training.experiment import Experiment, weighting_names
from lm.training.forward import (
    base_model,
    make_prediction_statistics,
    make_training_statistics,
)
from lm.training.state import TrainState, average_as_model
from objectives import Objective
from objectives.losses import CROSS_ENTROPY
from objectives.terms import minimise
from objectives.weighted import denominators, loss_term
from objectives.weighting import WEIGHTINGS, weight_metrics
from objectives.weighting.base import per_document


class Inspection(NamedTuple):
    """Texts as rows, each of one window of one document; float32 or int32 arrays [R, T].

    Attributes:
      document_R: which document a row is of.
      batch: the rows as a batch; slots with segment 0 are padding.
      nll, entropy: of every token, nats.
      references: what the weighting compares with, by name.
      weights: of the weighting; 0 where the weight of the data is.
      metrics: figures over all rows by name: mean_loss = sum(d nll) / sum(d), loss = the weighted
        one as training has it, targets, and those of `weight_metrics` and of the weighting.
    """

    document_R: np.ndarray
    batch: dict[str, np.ndarray]
    nll: np.ndarray
    entropy: np.ndarray
    references: dict[str, np.ndarray]
    weights: np.ndarray
    metrics: dict[str, float]


def cut(
    documents: Sequence[Document], tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Windows of at most `length` tokens, each a row of its own: (document [R], batch [R, T]).

    A window sees nothing of the one before, as a document that is cut in training. All windows of a
    document are one sample, with its index as the number.
    """
    rows, document_R = [], []
    for index, document in enumerate(documents):
        positions = encode_document(document, tokenizer)
        places = np.arange(len(positions), dtype=np.int32)
        sample = np.int32(index)
        positions = add_fields(positions, sample_ids=sample, sample_positions=places)
        for start in range(0, len(positions), length):
            rows.append(make_row([positions[start : start + length]], length))
            document_R.append(index)
    return np.array(document_R), {name: np.stack([r[name] for r in rows]) for name in rows[0]}


def inspect(
    run: Experiment,
    state: TrainState,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    second_models: Mapping[str, tuple[Model, Trained]] | None = None,
) -> Inspection:
    """Weighs documents as a train step of a run would weigh them, were they its batch.

    As in training the model is not its moving average, it is quantized when the run is in that
    phase, and statistics of the batch are those of all rows. The weighting starts from its initial
    state. `second_models` maps sources of `objective.references` to what they hold.

    Raises:
      InputError: no document has a token that counts, or the weighting needs more than other text
        than the run's own has.
    """
    c, objective = run.config, run.objective
    document_R, batch = cut(documents, tokenizer, c.data.sequence_length)
    _check_texts(c, objective, batch)
    quantized = run.quantized if run.usable(state)[1] else None
    rows = c.train.batch_size // c.train.accumulation
    likelihood = objective.loss._replace(losses=None, statistics=None, reduce=None, teachers=())
    likelihood = likelihood._replace(references=(), batch_keys=())
    of_likelihood = objective._replace(loss=likelihood)
    measure = make_training_statistics(run.model, c.objective.block_size, of_likelihood, quantized)
    own, aux = _in_batches(measure, state.trained, batch, rows)
    references = {}
    for name in run.references():
        source = c.objective.references[name]
        if source == EMA:
            whole = likelihood._replace(attention_blocks=None)
            model, options = run.model, (quantized, whole)
            trained = average_as_model(model, state.ema)
        elif source == BASE:
            (model, trained), options = base_model(run.model, state.trained), ()
        else:
            (model, trained), options = second_models[source], ()
        measure = make_prediction_statistics(model, c.objective.block_size, *options)
        references[name] = _in_batches(measure, trained, batch, rows).nll
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    prepared = objective.prepare(
        own, aux, arrays, references, objective.init(), jnp.asarray(state.step)
    )
    weights_BT = prepared.rows["weights"]
    plain = denominators(arrays["weights"], arrays["weights"])
    loss, mean = (
        minimise({"loss": loss_term(CROSS_ENTROPY, own, w_BT, totals)})[0]
        for w_BT, totals in ((weights_BT, prepared.totals), (arrays["weights"], plain))
    )
    metrics = dict(prepared.metrics) | weight_metrics(weights_BT, arrays["weights"])
    metrics |= {"loss": loss, "mean_loss": mean, "targets": plain["targets"]}
    references |= {name: x for name, x in aux.items() if isinstance(x, jax.Array)}
    return Inspection(
        document_R,
        batch,
        np.asarray(own.nll),
        np.asarray(own.entropy),
        {name: np.asarray(x) for name, x in references.items()},
        np.asarray(weights_BT),
        {name: float(x) for name, x in metrics.items()},
    )


def _check_texts(config: ConfigDict, objective: Objective, batch: Mapping[str, np.ndarray]) -> None:
    """Refuses texts that the objective cannot weigh.

    Raises:
      InputError: as `inspect`.
    """
    missing = [key for key in objective.batch_keys if key not in (*batch, "keys")]
    # A table of training documents has no entry for other text.
    names = [name for name in weighting_names(config) if name in WEIGHTINGS]
    missing += ["sample_ids"] * any(per_document(WEIGHTINGS[name]) for name in names)
    if missing:
        kind = "weighting" if config.objective.name == "weighted" else "name"
        raise InputError(
            f"objective.{kind}={config.objective[kind]!r} needs {' and '.join(missing)} of "
            "training documents, which other text does not have"
        )
    if not batch["weights"].any():
        raise InputError("the texts have no token of weight above 0, so there is nothing to weigh")


def _in_batches(statistics: Callable[..., Any], trained: Any, batch, rows: int) -> Any:
    """Statistics of all rows, `rows` at a time; the last batch is filled up with first rows."""
    statistics = jax.jit(statistics)
    count = len(batch["tokens"])
    rows = min(rows, count)
    parts = []
    for start in range(0, count, rows):
        chosen = np.arange(start, start + rows) % count
        parts.append(statistics(trained, {name: x[chosen] for name, x in batch.items()}))
    return jax.tree.map(lambda *x: jnp.concatenate(x)[:count], *parts)
