"""What a profiler's trace says of a train step, beside what arithmetic and memory let it be.

The trace is the `plugins/profile/RUN/HOST.trace.json.gz` that jax.profiler.trace writes: events in
the Chrome format, "ts" and "dur" in microseconds. Read with the standard library alone; what it
holds is data, of which nothing is run.
"""

import gzip
import json
import math
import re
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lm.errors import InputError, shown
from lm.planning.flops import flops_by_part
from lm.planning.plan import count_bytes
from lm.training import experiment
from lm.training.state import parameter_shapes

# Bytes of a trace's JSON, which take about ten times as many in memory. The profiler keeps a
# million events at most, some 200 MB.
_MOST_BYTES = 1 << 28
_BLOCK = 1 << 20

OTHER = "everything else"

# Kind of an operation -> what its name, its category or its place in the program tells; the first
# that fits counts. A fusion that the trace gives no place in the program is `OTHER`.
_KINDS = {
    "collectives": r"all-reduce|all-gather|reduce-scatter|all-to-all|collective|nccl",
    "attention": r"\battend\b|fmha|flash|sdpa|splash",
    "loss": r"token_statistics|cross_entropy",
    "optimizer": r"\boptimizer\b",
    "matrix products": r"\bdot|dot_general|gemm|nvjet|cutlass|cublas|matmul|convolution|einsum",
}
KINDS = (*_KINDS, OTHER)

_MODULE = re.compile(r"train_step")
_DEVICE = re.compile(r"^/device:(TPU|GPU):\d+")


class Measured(NamedTuple):
    """What a trace says of a train step.

    Attributes:
      steps: executions of the step in the trace, over all devices.
      devices: that ran it.
      step: seconds from the first to the last operation of a step on a device, the median.
      seconds: of each kind of `KINDS`, summed over a device's operations, mean of the steps. Where
        operations run beside each other, as on CPU, the sum may be above `step`.
    """

    steps: int
    devices: int
    step: float
    seconds: dict[str, float]


class Limits(NamedTuple):
    """FLOP/s of products and bytes/s of the memory of one device; None where unknown."""

    flops: float | None
    bandwidth: float | None
    source: str


class Row(NamedTuple):
    """One line of the comparison; seconds, None where unknown or not named by the trace."""

    name: str
    measured: float | None
    estimate: float | None

    @property
    def ratio(self) -> float | None:
        """measured / estimate."""
        return self.measured / self.estimate if self.measured and self.estimate else None


class _Event(NamedTuple):
    name: str
    start: float
    end: float
    arguments: dict[str, Any]


# (process, thread) as the trace names them -> its events.
_Threads = dict[tuple[str, str], list[_Event]]


def find(folder: str) -> list[Path]:
    """The trace.json.gz of every host of the newest run in a profile's folder.

    Raises:
      InputError: there is none.
    """
    found = sorted(Path(folder).glob("plugins/profile/*/*.trace.json.gz"))
    if not found:
        raise InputError(f"--profile={folder}: no plugins/profile/*/*.trace.json.gz in it")
    return [path for path in found if path.parent == found[-1].parent]


def read(path: Path) -> _Threads:
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


def _event(event: dict[str, Any]) -> _Event:
    start, length = float(event["ts"]), float(event.get("dur", 0))
    arguments = event.get("args", {})
    if not (math.isfinite(start + length) and length >= 0 and isinstance(arguments, dict)):
        raise ValueError(f"event {shown(event.get('name'))} has no time")
    return _Event(str(event["name"]), start / 1e6, (start + length) / 1e6, arguments)


def measure(traces: Iterable[_Threads], path: str, name: str | None = None) -> Measured:
    """Times of the train step in traces.

    Args:
      traces: of `read`, one a host.
      path: what errors name.
      name: of a jax.profiler.TraceAnnotation, as launch.benchmark's "step tiny": counts only the
        steps within; needed where the trace has several of them.

    Raises:
      InputError: there is no train step, or more than one kind of them.
    """
    windows, totals, devices = [], defaultdict(float), 0
    for threads in traces:
        spans = _annotated(threads, path, name)
        for own, operations in _devices(threads):
            inside = [w for w in own if not spans or any(a <= sum(w) / 2 <= b for a, b in spans)]
            windows += inside
            devices += bool(inside)
            for kind, seconds in _by_kind(operations, inside):
                totals[kind] += seconds
    if not windows:
        raise InputError(f"{path}: no train step on a device; the programs' name is train_step")
    seconds = {kind: totals[kind] / len(windows) for kind in KINDS}
    return Measured(len(windows), devices, median(b - a for a, b in windows), seconds)


def _annotated(threads: _Threads, path: str, name: str | None) -> list[tuple[float, float]]:
    """Where the host ran steps of that name; of the only name where none is given."""
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
    return spans[name] if name else next(iter(spans.values()), [])


def _devices(threads: _Threads) -> Iterable[tuple[list[tuple[float, float]], list[_Event]]]:
    """(start and end of the train steps, operations with the seconds of their own) by device."""
    processes = sorted({process for process, _ in threads if _DEVICE.match(process)})
    for process in processes:
        own = {thread: e for (p, thread), e in threads.items() if p == process}
        streams = [e for thread, e in own.items() if thread.startswith("Stream")]
        operations = [_alone(e) for e in streams or [own.get("XLA Ops", [])]]
        modules = [e for e in own.get("XLA Modules", []) if _MODULE.search(e.name)]
        found = [e for each in operations for e in each]
        yield [(e.start, e.end) for e in modules] or _runs(found), found
    if not processes:  # XLA on CPU: its threads are the host's
        ours = [[e for e in events if "hlo_op" in e.arguments] for events in threads.values()]
        found = [e for each in ours for e in _alone(each)]
        yield _runs(found), found


def _runs(operations: Iterable[_Event]) -> list[tuple[float, float]]:
    """Start and end of each execution, by the numbers that operations have of it."""
    spans = {}
    for e in operations:
        if _MODULE.search(str(e.arguments.get("hlo_module", ""))) and "run_id" in e.arguments:
            first, last = spans.get(run := str(e.arguments["run_id"]), (math.inf, -math.inf))
            spans[run] = min(first, e.start), max(last, e.end)
    return sorted(spans.values())


def _alone(events: Iterable[_Event]) -> list[_Event]:
    """The events of a thread with what those inside of each, as in a loop, take off its time.

    Its seconds stand in `arguments` as "alone".
    """
    found, open_ = [], []
    for e in sorted(events, key=lambda e: (e.start, -e.end)):
        while open_ and open_[-1].end <= e.start:
            open_.pop()
        if open_:
            open_[-1].arguments["alone"] -= min(e.end, open_[-1].end) - e.start
        e = e._replace(arguments={**e.arguments, "alone": e.end - e.start})
        found.append(e)
        open_.append(e)
    return found


def _by_kind(
    operations: Iterable[_Event], windows: list[tuple[float, float]]
) -> Iterable[tuple[str, float]]:
    windows = sorted(windows)
    starts = [start for start, _ in windows]
    for e in operations:
        i = bisect_right(starts, e.start) - 1
        module = str(e.arguments.get("hlo_module", "train_step"))
        if i >= 0 and e.start < windows[i][1] and _MODULE.search(module):
            yield kind(e.name, e.arguments), max(0.0, e.arguments["alone"])


def kind(name: str, arguments: dict[str, Any]) -> str:
    """The kind of an operation, one of `KINDS`.

    Args:
      name: of the operation or kernel, such as "all-reduce.1" or "dot_general.138".
      arguments: of its event: "hlo_category", "hlo_op" and, of TPUs and GPUs, its place in the
        program, "tf_op" or "name".
    """
    keys = ("hlo_category", "hlo_op", "tf_op", "name")
    text = " ".join([name, *(str(arguments.get(key, "")) for key in keys)])
    return next((k for k, pattern in _KINDS.items() if re.search(pattern, text)), OTHER)


def machine_limits(folder: str, dtype: str) -> Limits | None:
    """What launch.benchmark has written beside its trace; None where there is no such file.

    Raises:
      InputError: the file is damaged.
    """
    path = Path(folder) / "machine.json"
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _BLOCK:
            raise ValueError("too large")
        record = json.loads(path.read_text())
        flops, bandwidth = float(record["peak_flops"][dtype]), float(record["bandwidth"])
        if not (0 < flops < math.inf and 0 < bandwidth < math.inf):
            raise ValueError("not above 0")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: no peak_flops of {dtype} and bandwidth: {error}") from None
    return Limits(flops, bandwidth, "as launch.benchmark measured them beside the trace")


def estimate(
    run: experiment.Experiment, limits: Limits, communication: float | None = None
) -> dict[str, float | None]:
    """Seconds that each kind of `KINDS` takes at the limits of a device, and "step", their sum.

    Matrix products, attention and loss by their model FLOPs, see `flops_by_part`; the optimizer by
    the bytes of what it reads (state, gradients) and writes (state). Nothing is estimated of the
    rest, and of collectives only `communication`, from `lm.planning.ahead`: on several devices
    without it there is no estimate of the step.
    """
    c = run.config
    tokens = c.train.batch_size * c.data.sequence_length / run.mesh.size
    shapes = parameter_shapes(run.model)
    parts = flops_by_part(run.model.config, shapes, c.data.sequence_length, run.trainable)
    found = {k: n * tokens / limits.flops if limits.flops else None for k, n in parts.items()}
    state = run.abstract_state()
    weights, moments = (count_bytes(x).per_device for x in (state.trained, state.optimizer))
    moved = 2 * (weights + moments) + weights
    found["optimizer"] = moved / limits.bandwidth if limits.bandwidth else None
    found["collectives"] = communication
    known = [found[k] for k in parts] + [found["optimizer"] or 0.0, communication or 0.0]
    alone = run.mesh.size == 1 or communication is not None
    return found | {"step": sum(known) if limits.flops and alone else None, OTHER: None}


def compare(measured: Measured, estimates: dict[str, float | None]) -> list[Row]:
    """The step, then the kinds: those off by most first, and those of no known ratio last.

    A kind of which the trace names nothing has no measured seconds.
    """
    rows = [Row(k, measured.seconds[k] or None, estimates.get(k)) for k in KINDS]
    rows = [row for row in rows if row.measured or row.estimate]

    def off(row):
        return abs(math.log(row.ratio)) if row.ratio else -1.0

    first = Row("step", measured.step, estimates.get("step"))
    return [first, *sorted(rows, key=off, reverse=True)]
