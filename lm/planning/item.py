"""One thing that a benchmark times."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Item(NamedTuple):
    """What can be timed.

    Attributes:
      name: with its sizes.
      run: starts the work once and gives arrays to wait for.
      flops: of one run, by `formula`; 0 where the limit is the memory's alone.
      bytes: that one run must move at least, by `formula`; 0 where the limit is arithmetic alone.
      formula: how both were counted.
      dtype: of the products, which decides the peak.
      tokens: of one run; 0 where there are none.
      reads_ahead: whether it goes on working after its run has ended.
      program: gives the optimized HLO text of what `run` starts, of a train step; None elsewhere.
    """

    name: str
    run: Callable[[], Any]
    flops: float
    bytes: float
    formula: str
    dtype: str = "float32"
    tokens: int = 0
    reads_ahead: bool = False
    program: Callable[[], str] | None = None
