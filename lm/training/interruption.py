"""Work beside the training steps that a signal may end."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lm.training import experiment

if TYPE_CHECKING:
    from lm.training.loop import Loop


class Interrupted(Exception):
    """A signal has asked the run to stop, and the state is that of a whole number of steps."""


@contextlib.contextmanager
def validation_batches(loop: "Loop") -> Iterator[Any]:
    """Batches of the validation split, between which a signal is looked for."""
    stream = iter(
        experiment.evaluation_batches(
            loop.config, loop.data.validation, loop.data.tokenizer, loop.built.mesh
        )
    )
    with contextlib.closing(stream):
        yield interruptible(loop, stream)


def interruptible(loop: "Loop", stream: Iterator[Any]) -> Iterator[Any]:
    """The stream; between two of it a signal is looked for."""
    for one in stream:
        loop.check_interrupt()
        yield one
