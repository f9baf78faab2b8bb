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
from lm.references.pulls import make_look, pulls
from lm.training.experiment import Experiment
from lm.training.state import TrainState


class PairInspection(NamedTuple):
    """Records of preference data, each in a row of its own; float32 or int32 arrays [R, T].

    Attributes:
      documents: the records that the objective can use.
      batch: the rows as a batch.
      nll: of every token, nats.
      log_ratio: log p - log p_reference, or log p where nothing is compared with.
      pull: see `lm.references.pulls.pulls`.
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

    See `lm.references.pulls.make_look`.

    Raises:
      InputError: the objective can use none of the records, or needs random keys.
    """
    look, terms = make_look(run, state, second_models)
    usable, rows = _rows(documents, tokenizer, reading, run.config.data.sequence_length)
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    seen, alone = [], []
    for r in range(len(rows)):
        row = {name: jnp.asarray(x[r : r + 1]) for name, x in batch.items()}
        seen.append(look(row))
        alone.append(terms(seen[-1], row)[1])
    together = jax.tree.map(lambda *x: jnp.concatenate(x), *seen)
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    pull_RT, metrics = pulls(terms, together, arrays, len(rows))
    return PairInspection(
        usable,
        batch,
        np.asarray(together.statistics.nll),
        np.asarray(together.log_ratio),
        pull_RT,
        together.is_compared,
        {name: np.array([float(one[name]) for one in alone]) for name in alone[0]},
        metrics,
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
