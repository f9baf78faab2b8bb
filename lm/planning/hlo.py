"""What an optimized HLO module says: loops, collectives by mesh axis, and estimated cycles.

The text is `compiled.as_text()`; everything inside a loop counts as often as the loop runs.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Collective(NamedTuple):
    """Collectives of one kind over the same mesh axes, on one device, in one step.

    Attributes:
      count: how often they run.
      bytes: of the whole array: the result of an all-gather, what goes into a reduce-scatter;
        of the others both have the same size.
      received: bytes that a device cannot do without receiving. Of an array of b bytes and groups
        of n devices, b (n - 1) / n in an all-gather, a reduce-scatter or an all-to-all, twice that
        in an all-reduce, b in a permute.
      across: those of them that must come from other slices, when the devices of a group in one
        slice share them out: of groups in s slices, b / (n / s) in place of b and s in place of n.
    """

    count: int
    bytes: int
    received: int
    across: int = 0


class Program(NamedTuple):
    """What `read_program` finds.

    Attributes:
      loops: how often each loop runs; a loop inside another one once.
      collectives: kind -> axes, as "fsdp" or "data+fsdp" -> Collective. Axes of which a group has
        only a part are followed by "(part)"; without a mesh all of it is under "".
      cycles: XLA's estimate of all instructions that have one.
      kernels: how often kernels run, written in Pallas, of which XLA has no estimate.
    """

    loops: tuple[int, ...]
    collectives: dict[str, dict[str, Collective]]
    cycles: int
    kernels: int


PART = " (part)"

_KINDS = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
# Every array of a shape: its dtype and its sizes.
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([^ ,)]+)")
_BRANCHES = re.compile(r"(?:called_computations|branch_computations)=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def read_program(
    text: str, mesh: Mapping[str, int] | None = None, slices: Sequence[int] | None = None
) -> Program:
    """Follows an optimized HLO module from its entry.

    On TPU, a collective that runs beside other work appears in every fusion that moves it on; it
    counts where it starts. A fusion that XLA has named all-reduce-scatter is a reduce-scatter. Of
    a conditional all branches count.

    Args:
      text: `compiled.as_text()`.
      mesh: size of each axis, in the order in which devices were given to the compiler.
      slices: the slice of each device, in the same order; all in one by default.
    """
    bodies, entry = computations(text)
    loops: dict[str, int] = {}
    found: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0, 0])
    totals: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int, fused: bool) -> None:
        for line in bodies.get(name, ()):
            if one := collective(line, name, mesh, slices):
                for i, value in enumerate((1, one.bytes, one.received, one.across)):
                    found[one.kind, one.axes][i] += times * value
            if not fused:
                totals["cycles"] += times * cycles(line)
            if 'custom_call_target="tpu_custom_call"' in line:
                totals["kernels"] += times
            if " while(" in line:
                inner = body(line)
                loops[inner] = trips(line, bodies)
                visit(inner, times * loops[inner], fused)
            else:
                for called in callees(line):
                    visit(called, times, fused or " fusion(" in line)

    visit(entry, 1, False)
    by_kind: dict[str, dict[str, Collective]] = {}
    for (kind, axes), numbers in sorted(found.items()):
        by_kind.setdefault(kind, {})[axes] = Collective(*numbers)
    return Program(tuple(loops.values()), by_kind, totals["cycles"], totals["kernels"])


class Found(NamedTuple):
    """One collective; see `Collective`."""

    kind: str
    axes: str
    bytes: int
    received: int
    across: int


def collective(
    line: str,
    computation: str,
    mesh: Mapping[str, int] | None,
    slices: Sequence[int] | None,
) -> Found | None:
    """The collective of an instruction, None without one; see `read_program`.

    Args:
      line: an instruction.
      computation: name of the one that it is in.
      mesh: size of each axis.
      slices: the slice of each device.
    """
    match = _COLLECTIVE.search(line)
    if not match or re.search(r'"flag_start":"\d', line):
        return None
    result, kind, start = match.groups()
    arrays = [array_bytes(*array) for array in ARRAY.findall(result)]
    # The result of a start is a tuple of operand and result.
    pair = start and kind in ("all-gather", "collective-permute")
    size = max(arrays) if pair else sum(arrays)
    groups = device_groups(line, math.prod(mesh.values())) if mesh else None
    axes = name_axes(groups, mesh) if mesh else ""
    group, parts = 1, 1
    if groups is not None:
        group = groups.shape[1]
        parts = 1 if slices is None else len(set(np.asarray(slices)[groups[0]].tolist()))
    if kind == "collective-permute":
        return Found(kind, axes.removesuffix(PART), size, size, size * (parts > 1))
    if kind == "reduce-scatter":
        size *= group
    fused = "all-reduce-scatter" in computation
    kind = "reduce-scatter" if fused and kind == "all-reduce" else kind
    passes = 2 if kind == "all-reduce" else 1
    received = passes * size * (group - 1) // group
    across = passes * size * (parts - 1) // group
    return Found(kind, axes, size, received, across)


_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[^=]*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_MESH_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def device_groups(line: str, count: int) -> np.ndarray:
    """The devices of each group of a collective, or each (source, target): [groups, members].

    Args:
      line: an instruction with replica_groups or source_target_pairs, in any of the three forms
        of HLO: lists, `[4,2]<=[2,4]T(1,0)`, or a mesh with the names of the axes that are summed.
      count: number of devices, which are one group where nothing is said.
    """
    if found := _LISTS.search(line):
        lists = re.findall(r"\{([\d,]*)\}", found[1])
        return np.array([[int(x) for x in one.split(",")] for one in lists])
    if found := _IOTA.search(line):
        return _iota(found[2], found[3]).reshape(_integers(found[1]))
    if found := _MESH.search(line):
        sizes = {name: int(size) for name, size in _MESH_AXIS.findall(found[1])}
        devices = _iota(found[2] or str(count), found[3])
        parts = {name: (pre, size) for name, pre, size in _MESH_PART.findall(found[4])}
        shape, summed = [], []
        for name, size in sizes.items():
            if name in parts:
                # "(2)4" is the 4 in the middle of an axis that is cut as 2 x 4 x the rest.
                before = int(parts[name][0] or 1)
                middle = int(parts[name][1] or size)
                summed.append(len(shape) + 1)
                shape += [before, middle, size // before // middle]
            else:
                shape.append(size)
        kept = [axis for axis in range(len(shape)) if axis not in summed]
        members = math.prod(shape[axis] for axis in summed)
        return devices.reshape(shape).transpose(kept + summed).reshape(-1, members)
    return np.arange(count)[None]


def name_axes(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The axes along which the members of a group differ, joined by "+".

    "(part)" after them says that a group is not all devices along these axes.
    """
    coordinates = np.unravel_index(groups, tuple(mesh.values()))
    varying = [
        axis for axis, where in zip(mesh, coordinates, strict=True) if (where != where[:, :1]).any()
    ]
    whole = groups.shape[1] == math.prod(mesh[axis] for axis in varying)
    return "+".join(varying) + PART * (not whole)


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _integers(shape)
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return (devices.transpose(_integers(order)) if order else devices).reshape(-1)


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a module by its name, and the entry's name; "" for none."""
    bodies: dict[str, list[list[str]]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None and line.startswith("  "):
            lines.append([line])
        elif lines:  # what a kernel says of itself has lines of its own
            lines[-1].append(line)
    return {name: ["".join(parts) for parts in lines] for name, lines in bodies.items()}, entry


def callees(line: str) -> list[str]:
    """Names of the computations that an instruction calls, but for those of a while loop."""
    several = [name.strip(" %") for names in _BRANCHES.findall(line) for name in names.split(",")]
    return _CALLED.findall(line) + several


def body(line: str) -> str:
    """The computation that a loop repeats."""
    return re.search(r"body=%([^ ,]+)", line)[1]


def cycles(line: str) -> int:
    """XLA's estimate of an instruction, 0 without one."""
    found = _CYCLES.search(line)
    return int(found[1]) if found else 0


def trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as XLA says, or the one number that its condition compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = "\n".join(bodies[re.search(r"condition=%([^ ,]+)", line)[1]])
    limits = re.findall(r" constant\((\d+)\)", condition)
    return int(limits[0]) if len(limits) == 1 else 1


def array_bytes(dtype: str, sizes: str) -> int:
    """Bytes of an array from the two groups of `ARRAY`, as "bf16" and "8,128"."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
