"""How much communication a scheduled HLO module hides behind computation, by the compiler's order.

The text is `compiled.as_text()` of a module with is_scheduled=true: the lines of a computation are
in the order in which the device begins them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lm.planning import hlo


class Overlap(NamedTuple):
    """Communication of a step on one device, as scheduled.

    Attributes:
      count: how often collectives run.
      asynchronous: how many of them have a start and a later end, with room for other work.
      seconds: that all of them take, one after another.
      covered: of those, seconds that pass while computation runs.
    """

    count: int
    asynchronous: int
    seconds: float
    covered: float


class _Wait(NamedTuple):
    """What one instruction does to the collectives in flight.

    Attributes:
      started: name -> seconds of what starts here.
      ended: names of what must have ended after it.
      alone: seconds of each collective that nothing can run beside.
    """

    started: dict[str, float]
    ended: list[str]
    alone: list[float]


def overlap(
    text: str,
    mesh: Mapping[str, int],
    seconds_of: Callable[[int, int], float],
    cycle_seconds: float,
    slices: Sequence[int] | None = None,
) -> Overlap:
    """Follows a scheduled HLO module from its entry, loops as often as they run.

    Collectives that have started share the links in the order in which they started. They move on
    while instructions run for which XLA has estimated cycles, until the instruction that waits for
    them; what is left then is not covered. Nothing is covered by kernels and by the other
    instructions without estimated cycles, nor by the next turn of a loop.

    A collective is asynchronous as `all-gather-start` and `all-gather-done`, as `async-start` of a
    computation with one, or, on TPU, as fusions with the calls AsyncCollectiveStart and
    AsyncCollectiveDone.

    Args:
      text: `compiled.as_text()`.
      mesh: size of each axis, in the order in which devices were given to the compiler.
      seconds_of: bytes that a collective receives, and those of them from other slices -> seconds.
      cycle_seconds: of one of XLA's cycles.
      slices: the slice of each device, in the same order; all in one by default.
    """
    bodies, entry = hlo.computations(text)
    totals = [0, 0, 0.0, 0.0]

    def visit(name: str, times: int) -> float:
        """Adds a computation that runs so often; seconds of one run that cover no collective."""
        flight: dict[str, float] = {}
        spare = 0.0

        def compute(seconds: float) -> None:
            nonlocal spare
            for key, left in flight.items():
                moved = min(left, seconds)
                flight[key] = left - moved
                seconds -= moved
                totals[3] += times * moved
            spare += seconds

        for line in bodies.get(name, ()):
            if " while(" in line:
                trips = hlo.trips(line, bodies)
                compute(trips * visit(hlo.body(line), times * trips))
                continue
            found = _read(line, bodies, mesh, seconds_of, slices)
            totals[0] += times * (len(found.started) + len(found.alone))
            totals[1] += times * len(found.started)
            totals[2] += times * (sum(found.started.values()) + sum(found.alone))
            flight |= found.started
            compute(hlo.cycles(line) * cycle_seconds)
            for key in found.ended:
                _end(flight, key)
            if " call(" in line or " conditional(" in line:
                compute(sum(visit(called, times) for called in hlo.callees(line)))
        return spare

    visit(entry, 1)
    return Overlap(*totals)


def _end(flight: dict[str, float], key: str) -> None:
    """Waits for a collective, and so for all that share the links with it and were first."""
    if key not in flight:
        return
    for other in list(flight):
        flight[other] = 0.0
        if other == key:
            break
    del flight[key]


_NAME = re.compile(r"\s*(?:ROOT )?%([^ ]+) = ")
_OPERANDS = re.compile(r"%([^ ,()]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_DONE = re.compile(r" [a-z-]+-done\([^%]*%([^ ,()]+)")


def _read(
    line: str,
    bodies: Mapping[str, list[str]],
    mesh: Mapping[str, int],
    seconds_of: Callable[[int, int], float],
    slices: Sequence[int] | None,
) -> _Wait:
    """The collectives of an instruction that is no loop."""
    wait = _Wait({}, [], [])
    if done := _DONE.search(line):
        wait.ended.append(done[1])
        return wait
    begins = re.search(r" [a-z-]+-start\(", line)
    # What a call or a conditional runs is an instruction of its own.
    inside = [] if re.search(r" (?:call|conditional)\(", line) else _inside(line, bodies)
    lines = [one for _, one in inside]
    started, ended = _calls(lines, "AsyncCollectiveStart"), _calls(lines, "AsyncCollectiveDone")
    wait.ended.extend(ended)
    for computation, one in [("", line), *inside]:
        found = hlo.collective(one, computation, mesh, slices)
        if not found:
            continue
        seconds, channel = seconds_of(found.received, found.across), _CHANNEL.search(one)
        if begins:
            wait.started[_NAME.match(line)[1]] = seconds
        elif channel and channel[1] in started:
            wait.started[channel[1]] = seconds
        elif not channel or channel[1] not in ended:
            wait.alone.append(seconds)
    return wait


def _calls(lines: Sequence[str], target: str) -> set[str]:
    """Channels of the collectives that a call to a function of the TPU's runtime is about."""
    channels = {
        _NAME.match(line)[1]: found[1] for line in lines if (found := _CHANNEL.search(line))
    }
    calls = [line for line in lines if f'custom_call_target="{target}"' in line]
    operands = {name for line in calls for name in _OPERANDS.findall(line.partition("(")[2])}
    return {channels[name] for name in operands & channels.keys()}


def _inside(line: str, bodies: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """(computation, line) of everything that an instruction calls, and of what that calls."""
    found = []
    for name in hlo.callees(line):
        for one in bodies.get(name, ()):
            found += [(name, one), *_inside(one, bodies)]
    return found
