"""Programs that do not depend on each other, one after the other."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


def in_turn(results: Iterable[T]) -> Iterator[T]:
    """The trees of arrays in `results`, lazily; on CPU each is computed before the next begins.

    All CPU devices of a process share one pool of threads. Two programs in flight can fill it with
    threads that wait in a collective for the other devices' part of the same program, which then
    finds no thread: XLA aborts after 60 seconds. A program that takes the result of the one before
    cannot; independent ones have to pass through here. TPUs and GPUs keep the order themselves.
    """
    for result in results:
        yield jax.block_until_ready(result) if jax.default_backend() == "cpu" else result
