"""Seconds of the items of a benchmark, in turns, and what they are compared with."""

import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from lm.planning.item import Item

# A timing covers as many runs as take this long, so that neither the clock nor the dispatch of a
# small piece decides.
_LEAST_SECONDS = 0.02


def measure(items: Iterable[Item], repeats: int) -> dict[str, list[float]]:
    """Seconds of one run, `repeats` times, by name.

    Every item is compiled and warmed up first. Then all take turns, so that a drift of the machine
    hits all of them; those that read ahead come last, or they would work while others are timed.
    A timing follows a run of the same item that does not count: where others had run for seconds,
    the first step took up to twice the time, spent by the kernel on pages that malloc had freed.
    """
    items = list(items)
    seconds = {item.name: [] for item in items}
    for ahead in (False, True):
        turns = [item for item in items if item.reads_ahead == ahead]
        counts = {}
        for item in turns:
            jax.block_until_ready(item.run())
            counts[item.name] = max(1, math.ceil(_LEAST_SECONDS / _timed(item, 1)))
        for _ in range(repeats):
            for item in turns:
                jax.block_until_ready(item.run())
                seconds[item.name].append(_timed(item, counts[item.name]))
    return seconds


def _timed(item: Item, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        last = item.run()
    jax.block_until_ready(last)
    return (time.perf_counter() - start) / count


class Limits(NamedTuple):
    """What the machine reached: FLOP/s of products by dtype, and bytes/s of memory."""

    flops: dict[str, float]
    bandwidth: float


def limits(items: Iterable[Item], seconds: dict[str, list[float]]) -> Limits:
    """The best of the items of `machine` over all their repeats."""
    flops, bandwidth = {}, 0.0
    for item in items:
        best = min(seconds[item.name])
        if item.flops:
            flops[item.dtype] = max(flops.get(item.dtype, 0.0), item.flops / best)
        bandwidth = max(bandwidth, item.bytes / best)
    return Limits(flops, bandwidth)


class Figure(NamedTuple):
    """What came of an item.

    Attributes:
      seconds: median of one run.
      lower, upper: quartiles of the same.
      repeats: how many were timed.
      flops, bytes, formula: of the item.
      limit: seconds that it would take at the peak of products or at the bandwidth of memory,
        whichever is longer.
      bound: "products" or "memory": which one that is.
      fraction: limit / seconds.
      tokens_per_second: 0 where there are no tokens.
    """

    seconds: float
    lower: float
    upper: float
    repeats: int
    flops: float
    bytes: float
    formula: str
    limit: float
    bound: str
    fraction: float
    tokens_per_second: float


def figure(item: Item, seconds: list[float], limits: Limits) -> Figure:
    """Median, quartiles and fraction of the limit."""
    lower, median, upper = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    of = {
        "products": item.flops / limits.flops[item.dtype] if item.flops else 0.0,
        "memory": item.bytes / limits.bandwidth,
    }
    bound = max(of, key=of.get)
    return Figure(
        median,
        lower,
        upper,
        len(seconds),
        item.flops,
        item.bytes,
        item.formula,
        of[bound],
        bound,
        of[bound] / median,
        item.tokens / median,
    )
