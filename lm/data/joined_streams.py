"""Batches of several streams of rows as the batches of one."""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np


class Joined(grain.IterDataset):
    """The batches of `streams`, a dataset by its number, one below the other.

    A batch has the rows of the next batch of every stream, in their order. The state of an iterator
    is {"streams": {number: state}}, the numbers as text.
    """

    def __init__(self, streams: Mapping[int, grain.IterDataset]):
        super().__init__(list(streams.values()))
        self._numbers = [str(number) for number in streams]

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self._numbers, [iter(parent) for parent in self._parents])


class _Iterator(grain.DatasetIterator):
    def __init__(self, numbers: list[str], parents: list[grain.DatasetIterator]):
        super().__init__(parents)
        self._numbers = numbers

    def __next__(self) -> dict[str, np.ndarray]:
        parts = [next(parent) for parent in self._parents]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        states = (parent.get_state() for parent in self._parents)
        return {"streams": dict(zip(self._numbers, states, strict=True))}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, parent in zip(self._numbers, self._parents, strict=True):
            parent.set_state(state["streams"][number])

    def close(self) -> None:
        for parent in self._parents:
            parent.close()
