"""Where the batches of training come from.

B rows, T tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import grain
import jax
from jax.sharding import Mesh

from lm.data.layout import BATCH
from lm.errors import InputError
from lm.parallel.mesh import put_batch
from lm.training.state import TrainState
from objectives import Objective


class Spent(NamedTuple):
    """What a source that waits for answers of the model has spent since this process began.

    Attributes:
      sampling: seconds in which answers were drawn, without those of a program's first run.
      judging: seconds in which they were judged.
      compiling: seconds of the first runs of programs, most of them compilation.
      tokens: that were drawn in the seconds of `sampling`, by all processes.
    """

    sampling: float = 0.0
    judging: float = 0.0
    compiling: float = 0.0
    tokens: int = 0


class Source(Protocol):
    """A source of batches. Its state is saved with every checkpoint.

    Attributes:
      keys: names of the arrays in its batches.
      metrics: float32 scalars that describe the batch that was given last.
      spent: all zero for a source that nothing waits for.
    """

    keys: frozenset[str]
    metrics: Mapping[str, jax.Array]
    spent: Spent

    def next(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        """The batch of a step, arrays [B, T] on the mesh; `state` is that before the step."""

    def samples(self) -> str:
        """What the batch that was given last says, to read; "" where it is text of the data."""

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on from here, as JSON; of this process alone."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes back to where `get_state` was called, in this process or before a restart."""

    def close(self) -> None:
        """Ends threads and processes."""


class GrainSource:
    """Batches of a Grain dataset, put on the mesh.

    `further` are its keys besides those of every batch: stored references, and preference data.
    """

    def __init__(self, dataset: grain.IterDataset, mesh: Mesh, further: Iterable[str]):
        self.keys = frozenset((*BATCH, *further))
        self.metrics, self.spent = {}, Spent()
        self._iterator, self._mesh = iter(dataset), mesh

    def next(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        """The next batch; data does not depend on the step or on the state."""
        return put_batch(self._mesh, next(self._iterator))

    def samples(self) -> str:
        """Nothing: the text is that of the data."""
        return ""

    def get_state(self) -> dict[str, Any]:
        """The position in the data."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position, and begins to read ahead."""
        self._iterator.set_state(state)
        self._iterator.start_prefetch()

    def close(self) -> None:
        """Ends the threads or processes that read ahead."""
        self._iterator.close()


def check_keys(source: Source, objective: Objective) -> None:
    """Raises InputError for a batch key that the objective declares and the source has not."""
    # Random keys are made in the step.
    if missing := set(objective.batch_keys) - source.keys - {"keys"}:
        raise InputError(
            f"the objective needs {' and '.join(sorted(missing))} in every batch; the source of "
            f"batches has: {', '.join(sorted(source.keys))}"
        )
