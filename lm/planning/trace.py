"""Events of a profiler's trace: reading them, finding the train steps, adding up seconds.

The trace is the `plugins/profile/RUN/HOST.trace.json.gz` that jax.profiler.trace writes: events in
the Chrome format, "ts" and "dur" in microseconds. Read with the standard library alone; what it
holds is data, of which nothing is run.
"""

import gzip
import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm.errors import InputError, shown

# Bytes of a trace's JSON, which take about ten times as many in memory. The profiler keeps a
# million events at most, some 200 MB.
_MOST_BYTES = 1 << 28
_BLOCK = 1 << 20

_MODULE = re.compile(r"train_step")
_DEVICE = re.compile(r"^/device:(TPU|GPU):\d+")


class Event(NamedTuple):
    """Something that took time: seconds of its start and its end, and what is said of it."""

    name: str
    start: float
    end: float
    arguments: dict[str, Any]


# (process, thread) as the trace names them -> its events.
Threads = dict[tuple[str, str], list[Event]]


class Device(NamedTuple):
    """What ran on a device.

    Attributes:
      steps: start and end of each train step, in order.
      operations: of each stream or thread.
      shared: whether these share the cores that do the work, as the threads of a CPU do.
    """

    steps: list[tuple[float, float]]
    operations: list[list[Event]]
    shared: bool


def find(folder: str) -> list[Path]:
    """The trace.json.gz of every host of the newest run in a profile's folder.

    Raises:
      InputError: there is none.
    """
    found = sorted(Path(folder).glob("plugins/profile/*/*.trace.json.gz"))
    if not found:
        raise InputError(f"--profile={folder}: no plugins/profile/*/*.trace.json.gz in it")
    return [path for path in found if path.parent == found[-1].parent]


def read(path: Path) -> Threads:
    """The events of a trace by process and thread.

    Raises:
      InputError: the file is damaged, too large, or no trace.
    """
    text = _unpacked(path)
    try:
        events = json.loads(text)["traceEvents"]
        if not isinstance(events, list):
            raise TypeError
        names = {"process_name": {}, "thread_name": {}}
        for event in events:
            if event.get("ph") == "M" and event.get("name") in names:
                names[event["name"]][_identity(event)] = str(event["args"]["name"])
        processes = {pid: name for (pid, _), name in names["process_name"].items()}
        threads = defaultdict(list)
        for event in events:
            if event.get("ph") == "X":
                pid, tid = _identity(event)
                where = processes.get(pid, ""), names["thread_name"].get((pid, tid), "")
                threads[where].append(_event(event))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:100] or type(error).__name__
        raise InputError(f"{path}: not a trace of events: {problem}") from None
    return dict(threads)


def _unpacked(path: Path) -> bytes:
    blocks, size = [], 0
    try:
        with gzip.open(path) as file:
            while block := file.read(_BLOCK):
                size += len(block)
                if size > _MOST_BYTES:
                    raise InputError(f"{path}: more than {_MOST_BYTES >> 20} MiB: too long a trace")
                blocks.append(block)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {shown(str(error))}") from None
    return b"".join(blocks)


def _identity(event: dict[str, Any]) -> tuple[int, int]:
    return int(event["pid"]), int(event.get("tid", 0))


def _event(event: dict[str, Any]) -> Event:
    start, length = float(event["ts"]), float(event.get("dur", 0))
    arguments = event.get("args", {})
    if not (math.isfinite(start + length) and length >= 0 and isinstance(arguments, dict)):
        raise ValueError(f"event {shown(event.get('name'))} has no time")
    return Event(str(event["name"]), start / 1e6, (start + length) / 1e6, arguments)


def annotated(
    threads: Threads, path: str, name: str | None
) -> tuple[str | None, list[tuple[float, float]]]:
    """The name of the steps that the host ran, and where; without a name of the only one.

    Raises:
      InputError: naming `path`: there are several names, or not the one that is asked for.
    """
    spans = defaultdict(list)
    for (process, _), events in threads.items():
        if not _DEVICE.match(process):
            for event in events:
                if event.name.startswith(("step ", "variant ")) or event.name == name:
                    spans[event.name].append((event.start, event.end))
    if name and name not in spans:
        raise InputError(f"--name={name}: not in {path}; it has: {', '.join(map(shown, spans))}")
    if name is None and len(spans) > 1:
        names = ", ".join(shown(one) for one in spans)
        raise InputError(f"{path} has several steps; choose by --name, one of: {names}")
    name = name or next(iter(spans), None)
    return name, sorted(spans.get(name, []))


def devices(threads: Threads) -> Iterator[Device]:
    """The devices of a trace, each with its train steps and their operations."""
    processes = sorted({process for process, _ in threads if _DEVICE.match(process)})
    for process in processes:
        own = {thread: e for (p, thread), e in threads.items() if p == process}
        streams = [e for thread, e in own.items() if thread.startswith("Stream")]
        modules = [e for e in own.get("XLA Modules", []) if _MODULE.search(e.name)]
        yield _device(streams or [own.get("XLA Ops", [])], [(e.start, e.end) for e in modules])
    if not processes:  # XLA on CPU: its threads are the host's
        ours = [[e for e in events if "hlo_op" in e.arguments] for events in threads.values()]
        yield _device(ours, [])._replace(shared=True)


def _device(groups: list[list[Event]], steps: list[tuple[float, float]]) -> Device:
    steps = sorted(steps) or _runs(e for group in groups for e in group)
    kept = [[e for e in group if _of_step(e)] for group in groups]
    return Device(steps, kept, False)


def _of_step(e: Event) -> bool:
    return bool(_MODULE.search(str(e.arguments.get("hlo_module", "train_step"))))


def _runs(operations: Iterable[Event]) -> list[tuple[float, float]]:
    """Start and end of each execution, by the numbers that operations have of it."""
    spans = {}
    for e in operations:
        if _MODULE.search(str(e.arguments.get("hlo_module", ""))) and "run_id" in e.arguments:
            first, last = spans.get(run := str(e.arguments["run_id"]), (math.inf, -math.inf))
            spans[run] = min(first, e.start), max(last, e.end)
    return sorted(spans.values())


def add_up(
    groups: list[list[Event]], shared: bool
) -> tuple[list[tuple[Event, float]], dict[int, float]]:
    """Seconds of each operation, and by n the seconds in which n of them ran at the same time.

    A moment counts for the innermost operation of a stream or thread, not for a loop around it.
    Where the operations share the cores, a moment is divided evenly among those of all threads,
    so that the seconds of all sum up to those in which any ran.
    """
    events, changes = [], []
    for group in groups:
        for start, end, index in _innermost(group, len(events)):
            if end > start:
                # An end comes before a start of the same time.
                changes += [(start, 1, index), (end, 0, index)]
        events += group
    seconds, side_by_side = [0.0] * len(events), defaultdict(float)
    active, before = set(), 0.0
    for now, starts, index in sorted(changes):
        if active:
            side_by_side[len(active)] += now - before
            for one in active:
                seconds[one] += (now - before) / (len(active) if shared else 1)
        (active.add if starts else active.discard)(index)
        before = now
    return list(zip(events, seconds, strict=True)), dict(side_by_side)


def _innermost(group: list[Event], first: int) -> Iterator[tuple[float, float, int]]:
    """(start, end, number) of the pieces of time in which no event inside of an event runs.

    Args:
      group: events of one stream or thread.
      first: number of its first event.
    """
    open_: list[tuple[float, int]] = []
    since = -math.inf
    for i in sorted(range(len(group)), key=lambda i: (group[i].start, -group[i].end)):
        start, end = group[i].start, group[i].end
        while open_ and open_[-1][0] <= start:
            closed, number = open_.pop()
            yield since, closed, first + number
            since = closed
        if open_:
            yield since, start, first + open_[-1][1]
            end = min(end, open_[-1][0])
        open_.append((end, i))
        since = start
    while open_:
        closed, number = open_.pop()
        yield since, closed, first + number
        since = closed
