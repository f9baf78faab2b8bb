"""What a profiler's trace says of a train step, beside what arithmetic and memory let it be."""

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from lm.errors import InputError
from lm.planning import instructions, trace
from lm.planning.flops import flops_by_part
from lm.planning.instructions import Instruction
from lm.planning.plan import count_bytes
from lm.training import experiment
from lm.training.state import parameter_shapes

# Bytes of machine.json.
_MOST_BYTES = 1 << 20

OTHER = "everything else"
NONE = "no operation"
PRODUCTS, REST = ", products", ", rest"
_MATMUL = "matrix products"

# Kind of an operation -> what its name, its category or its place in the program tells; the first
# that fits counts. A fusion that the trace gives no place in the program is `OTHER`.
_KINDS = {
    "collectives": r"all-reduce|all-gather|reduce-scatter|all-to-all|collective|nccl",
    "attention": r"\battend\b|fmha|flash|sdpa|splash",
    "loss": r"token_statistics|cross_entropy",
    "optimizer": r"\boptimizer\b",
    _MATMUL: r"\bdot|dot_general|gemm|nvjet|cutlass|cublas|matmul|convolution|einsum",
}
KINDS = (*_KINDS, OTHER)

# Kinds that have a row for their products and one for the rest, where the program is known.
_SPLIT = ("attention", "loss")
# Kinds of other instructions without products, by a name of lm/model in their place.
_RESTS = {
    "norms": r"norm\b",
    f"MLP{REST}": r"\bmlp\b",
    f"projections{REST}": r"\blayers/attention\b",
}


class Work(NamedTuple):
    """What an instruction did in a step on a device.

    Attributes:
      kind: see `kind`.
      runs: of it in a step.
      seconds: of all of them.
      instruction: as the program says; None without the program, or where it is not in it.
    """

    kind: str
    runs: float
    seconds: float
    instruction: Instruction | None


class Measured(NamedTuple):
    """What a trace says of a train step.

    Attributes:
      steps: executions of the step in the trace, over all devices.
      devices: that ran it.
      step: seconds from the first to the last operation of a step on a device, the median.
      seconds: of each kind, the mean of the steps. On CPU, whose threads share the cores, each
        moment is divided evenly among the operations that run in it; elsewhere the times of all
        operations are summed, and may be above `step` where some run side by side.
      side_by_side: n -> seconds of a step in which n operations ran at the same time, the mean.
      program: the file in which the program was found; "" for none.
      work: what each instruction did, or each kernel where the program does not have it.
    """

    steps: int
    devices: int
    step: float
    seconds: dict[str, float]
    side_by_side: dict[int, float]
    program: str
    work: list[Work]


class Limits(NamedTuple):
    """FLOP/s of products and bytes/s of the memory of one device; None where unknown."""

    flops: float | None
    bandwidth: float | None
    source: str


class Reached(NamedTuple):
    """What the program says of the instructions of a kind, or of a step.

    Attributes:
      flops: of the dots in them.
      bytes: that they read and wrote.
      least: seconds at the limits, each instruction's FLOPs at the peak or its bytes at the
        bandwidth, whichever takes longer; None where a limit is unknown.
    """

    flops: float
    bytes: float
    least: float | None


class Row(NamedTuple):
    """One line of the comparison; seconds, None where unknown or not named by the trace.

    `reached` is None without the program.
    """

    name: str
    measured: float | None
    estimate: float | None
    reached: Reached | None = None

    @property
    def ratio(self) -> float | None:
        """measured / estimate."""
        return self.measured / self.estimate if self.measured and self.estimate else None


def measure(folder: str, name: str | None = None) -> Measured:
    """Times of the train step in the traces of a profile's folder, one a host.

    The program of the step is read from the file that launch.benchmark has written, where it is
    there.

    Args:
      folder: of the profile, as given to jax.profiler.trace.
      name: of a jax.profiler.TraceAnnotation, as launch.benchmark's "step tiny": counts only the
        steps within; needed where the trace has several of them.

    Raises:
      InputError: there is no train step, or more than one kind of them, or a damaged file.
    """
    windows, devices, side_by_side, step = [], 0, Counter(), None
    seconds: Counter[_Operation] = Counter()
    runs: Counter[_Operation] = Counter()
    for path in trace.find(folder):
        threads = trace.read(path)
        found, spans = trace.annotated(threads, folder, name)
        step = step or found
        for device in trace.devices(threads):
            steps = [s for s in device.steps if not spans or _within(sum(s) / 2, spans)]
            kept = [[e for e in each if _within(e.start, steps)] for each in device.operations]
            operations, counts = trace.add_up(kept, device.shared)
            windows += steps
            devices += bool(steps)
            side_by_side.update(counts)
            for e, spent in operations:
                one = _Operation.of(e)
                seconds[one] += spent
                runs[one] += 1
    if not windows:
        raise InputError(f"{folder}: no train step on a device; the programs' name is train_step")
    file = instructions.path(folder, step) if step else None
    program = instructions.read(file) if file and file.exists() else {}
    n = len(windows)
    work = _work({one: (runs[one] / n, spent / n) for one, spent in seconds.items()}, program)
    side = {count: spent / n for count, spent in sorted(side_by_side.items())}
    none = max(0.0, mean(b - a for a, b in windows) - sum(side.values()))
    return Measured(
        n,
        devices,
        median(b - a for a, b in windows),
        {k: sum(w.seconds for w in work if w.kind == k) for k in kinds(bool(program))},
        {0: none, **side},
        str(file) if program else "",
        work,
    )


class _Operation(NamedTuple):
    """What events are added up by: the kernel, the instruction, and what else tells its kind."""

    name: str
    instruction: str
    about: str

    @classmethod
    def of(cls, e: trace.Event) -> "_Operation":
        told = " ".join(str(e.arguments.get(key, "")) for key in ("hlo_category", "tf_op", "name"))
        return cls(e.name, str(e.arguments.get("hlo_op", e.name)), told)


def _within(time: float, spans: list[tuple[float, float]]) -> bool:
    """Whether a time lies in one of the spans, which are in order."""
    i = bisect_right(spans, time, key=lambda span: span[0]) - 1
    return i >= 0 and time <= spans[i][1]


def _work(
    operations: dict[_Operation, tuple[float, float]], program: dict[str, Instruction]
) -> list[Work]:
    """Runs and seconds of operations, by the instructions of the program where it has them."""
    found: dict[Any, Work] = {}
    for one, (runs, seconds) in operations.items():
        instruction = program.get(one.instruction)
        key = one if instruction is None else one.instruction
        before = found.get(key)
        if before:  # an instruction of several kernels, each of which ran as often as it
            runs, seconds = max(runs, before.runs), seconds + before.seconds
        text = f"{one.name} {one.instruction} {one.about}"
        found[key] = Work(kind(text, instruction), runs, seconds, instruction)
    return list(found.values())


def kinds(program: bool) -> list[str]:
    """The kinds that operations are told apart into, with or without the program."""
    if not program:
        return list(KINDS)
    split = [(k + PRODUCTS, k + REST) if k in _SPLIT else (k,) for k in _KINDS]
    return [*(k for each in split for k in each), *_RESTS, OTHER]


def kind(text: str, instruction: Instruction | None = None) -> str:
    """The kind of an operation, one of `kinds`.

    Args:
      text: the names of the kernel and the instruction, as "all-reduce.1" or "dot_general.138",
        its category and, of TPUs and GPUs, its place in the program, as the trace has them.
      instruction: as the program says, by which products are told from the rest.
    """
    if instruction:
        text = f"{text} {instruction.opcode} {instruction.place}"
    found = next((k for k, pattern in _KINDS.items() if re.search(pattern, text)), OTHER)
    if instruction is None:
        return found
    # Of a kernel that is not written in HLO the products are not known.
    products = instruction.flops > 0 or (
        instruction.opcode == "custom-call" and bool(re.search(_KINDS[_MATMUL], text))
    )
    if found in _SPLIT:
        return found + (PRODUCTS if products else REST)
    if found in (_MATMUL, OTHER):
        rests = (k for k, pattern in _RESTS.items() if re.search(pattern, instruction.place))
        return _MATMUL if products else next(rests, OTHER)
    return found


def reach(work: list[Work], limits: Limits) -> Reached:
    """What these instructions did, and the least seconds for it."""
    known = [(w.runs, w.instruction) for w in work if w.instruction]
    least = None
    if limits.flops and limits.bandwidth:
        least = sum(n * max(i.flops / limits.flops, i.bytes / limits.bandwidth) for n, i in known)
    return Reached(sum(n * i.flops for n, i in known), sum(n * i.bytes for n, i in known), least)


def machine_limits(folder: str, dtype: str) -> Limits | None:
    """What launch.benchmark has written beside its trace; None where there is no such file.

    Raises:
      InputError: the file is damaged.
    """
    path = Path(folder) / "machine.json"
    if not path.exists():
        return None
    try:
        if path.stat().st_size > _MOST_BYTES:
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

    Those of attention and loss are of their products, and stand under both names. Matrix products,
    attention and loss by their model FLOPs, see `flops_by_part`; the optimizer by
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
    found |= {k + PRODUCTS: found[k] for k in _SPLIT}
    return found | {"step": sum(known) if limits.flops and alone else None, OTHER: None}


def compare(measured: Measured, estimates: dict[str, float | None], limits: Limits) -> list[Row]:
    """The step, then its kinds.

    Without the program those off by most come first, and those of no known ratio last; with it
    those that take longest, and last the time in which no operation ran. A kind of which the trace
    names nothing has no measured seconds.
    """

    def row(name: str, seconds: float | None, work: list[Work]) -> Row:
        reached = reach(work, limits) if measured.program else None
        return Row(name, seconds, estimates.get(name), reached)

    def off(row: Row) -> float:
        return abs(math.log(row.ratio)) if row.ratio else -1.0

    rows = [
        row(k, seconds or None, [w for w in measured.work if w.kind == k])
        for k, seconds in measured.seconds.items()
    ]
    rows = [row for row in rows if row.measured or row.estimate]
    first = row("step", measured.step, measured.work)
    if not measured.program:
        return [first, *sorted(rows, key=off, reverse=True)]
    rows.sort(key=lambda row: row.measured or 0.0, reverse=True)
    return [first, *rows, Row(NONE, measured.side_by_side[0], None)]
