"""Means over the items of a task, with their standard errors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Figure(NamedTuple):
    """A metric of a task.

    Attributes:
      metric: its name, behind which stands that of its filter where there are several.
      value: over all items.
      standard_error: of the value; None where one item alone says nothing of it.
      items: how many there are.
    """

    metric: str
    value: float
    standard_error: float | None
    items: int


def mean(metric: str, values: Sequence[float]) -> Figure:
    """The mean x of n values, standard error sqrt(sum (x_i - x)^2 / (n - 1) / n)."""
    values_N = np.asarray(values, np.float64)
    count = len(values_N)
    error = float(np.std(values_N, ddof=1) / math.sqrt(count)) if count > 1 else None
    return Figure(metric, float(np.mean(values_N)), error, count)


def exponential(figure: Figure) -> Figure:
    """exp of a figure; its standard error by the delta method, exp(x) times that of x."""
    value = math.exp(figure.value) if figure.value < 700 else math.inf
    error = figure.standard_error
    return figure._replace(value=value, standard_error=None if error is None else value * error)


def ratio(metric: str, sums: Sequence[float], sizes: Sequence[float]) -> Figure:
    """r = sum_i s_i / sum_i w_i over n items, such as nats a word.

    Its standard error is that of a ratio of two sums, linearised: sqrt(n / (n - 1) sum_i (s_i -
    r w_i)^2) / sum_i w_i.
    """
    sums_N, sizes_N = np.asarray(sums, np.float64), np.asarray(sizes, np.float64)
    count, size = len(sums_N), float(np.sum(sizes_N))
    value = float(np.sum(sums_N)) / size if size else math.nan
    error = None
    if count > 1 and size:
        left = float(np.sum((sums_N - value * sizes_N) ** 2))
        error = math.sqrt(count / (count - 1) * left) / size
    return Figure(metric, value, error, count)


def scaled(figure: Figure, factor: float) -> Figure:
    """A figure in another unit."""
    error = figure.standard_error
    return figure._replace(
        value=factor * figure.value, standard_error=None if error is None else factor * error
    )
