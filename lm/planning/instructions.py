"""What an optimized HLO module says of each instruction: its place, its FLOPs and its bytes.

The text is `compiled.as_text()`, kept in a file beside a trace: launch.benchmark --profile=DIR
writes DIR/programs/*.hlo.txt. It comes from outside, so its size is checked before it is read, and
what cannot be followed is refused by name.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lm.errors import InputError, shown
from lm.planning import hlo

FOLDER = "programs"

# Bytes of the text. That of a step of four layers has 1.3 MB.
_MOST_BYTES = 1 << 26
# A number beyond is no size of anything.
_MOST = 1e30

# They start other instructions, which have times of their own, and do nothing else.
_STARTING = {"while", "conditional", "call"}
# They move no bytes.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
# Of their first operand they read as much as their result has.
_READING_PARTS = {"slice", "dynamic-slice", "gather"}
# Which operand is written into the first one, the rest of which stays as it is.
_WRITING_PARTS = {"dynamic-update-slice": 1, "scatter": 2}

_START = re.compile(r"\s+(ROOT )?%(\S+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_OPERAND = re.compile(r"%([^\s,()]+)")
_PLACE = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


class Instruction(NamedTuple):
    """What the program says of an instruction, of one execution.

    Attributes:
      opcode: as "fusion" or "dot".
      place: in the traced program, as "jit(train_step)/while/body/layers/mlp/dot_general". Of a
        fusion with dots it is the place of the largest dot, of another fusion the most common
        scope of its instructions, of other instructions their own; "" where none is known.
      flops: of the dots in it, 2 x elements of the result x size of what is summed over.
      bytes: of what it reads and writes. What is sliced from an operand counts as the slices, and
        what is updated in place as the update.
    """

    opcode: str
    place: str
    flops: int
    bytes: int


class _Line(NamedTuple):
    name: str
    root: bool
    shape: str
    opcode: str
    operands: list[str]
    text: str


class _Dots(NamedTuple):
    """Of a computation: the FLOPs of its dots, and those and the place of the largest one."""

    flops: int
    largest: int
    place: str


def path(folder: str, step: str) -> Path:
    """Where the program of a step, as "step tiny", lies in a profile's folder."""
    return Path(folder) / FOLDER / f"{re.sub(r'[^A-Za-z0-9]+', '_', step)}.hlo.txt"


def read(file: Path) -> dict[str, Instruction]:
    """The instructions of the program in a file, by name.

    Raises:
      InputError: the file is too large, cannot be read, or is no optimized HLO module.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise InputError(f"{file}: more than {_MOST_BYTES >> 20} MiB: too long a program")
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {shown(str(error))}") from None
    try:
        return parse(text)
    except RecursionError:
        raise InputError(f"{file}: not a program in HLO: calls are too deep") from None
    except ValueError as error:
        raise InputError(f"{file}: not a program in HLO: {shown(str(error))}") from None


def parse(text: str) -> dict[str, Instruction]:
    """The instructions of all computations of an optimized HLO module, by name.

    Raises:
      ValueError: the text has no entry, is cut off, or names what it does not hold.
      RecursionError: computations call each other too deep.
    """
    bodies, entry = hlo.computations(text)
    if not text.startswith("HloModule") or entry not in bodies or text.rstrip()[-2:] != "\n}":
        raise ValueError("it has no HloModule, no ENTRY or no end")
    return _Module({name: _lines(body) for name, body in bodies.items()}).instructions()


def _lines(body: list[str]) -> dict[str, _Line]:
    found = {}
    for text in body:
        if line := _line(text):
            found[line.name] = line
    return found


def _line(text: str) -> _Line | None:
    """The parts of an instruction; None where the line is not one."""
    start = _START.match(text)
    if not start:
        return None
    begin = start.end()
    end = _closing(text, begin) if text[begin : begin + 1] == "(" else text.find(" ", begin)
    opcode = _OPCODE.match(text, end) if end >= 0 else None
    if not opcode:
        return None
    close = _closing(text, opcode.end() - 1)
    operands = _OPERAND.findall(text, opcode.end(), close)
    return _Line(start[2], bool(start[1]), text[begin:end], opcode[1], operands, text[close:])


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis that opens at `begin` has closed; the end of the text if nowhere."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _size(shape: str) -> int:
    """Bytes of all arrays of a shape."""
    return sum(hlo.array_bytes(*array) for array in hlo.ARRAY.findall(shape))


class _Module:
    """The computations of a module, and what has been found of them so far."""

    def __init__(self, bodies: dict[str, dict[str, _Line]]):
        self._bodies = bodies
        self._dots: dict[str, _Dots] = {}
        self._places: dict[str, list[str]] = {}

    def instructions(self) -> dict[str, Instruction]:
        found = {}
        for body in self._bodies.values():
            for line in body.values():
                found[line.name] = self._instruction(line, body)
        return found

    def _instruction(self, line: _Line, body: dict[str, _Line]) -> Instruction:
        if line.opcode in _STARTING | _FREE:
            return Instruction(line.opcode, self._place(line), 0, 0)
        dots = self._dots_of(line, body)
        moved = self._fused_bytes(line, body) if line.opcode == "fusion" else _bytes(line, body)
        if not (dots.flops < _MOST and moved < _MOST):
            raise ValueError(f"{shown(line.name)} has sizes beyond any machine")
        return Instruction(line.opcode, dots.place or self._place(line), dots.flops, moved)

    def _computation(self, name: str) -> dict[str, _Line]:
        if name not in self._bodies:
            raise ValueError(f"it calls {shown(name)}, which it does not hold")
        return self._bodies[name]

    def _dots_of(self, line: _Line, body: dict[str, _Line]) -> _Dots:
        if line.opcode == "dot":
            flops = _dot_flops(line, body)
            return _Dots(flops, flops, self._place(line))
        return _together([self._dots_in(name) for name in hlo.callees(line.text)])

    def _dots_in(self, name: str) -> _Dots:
        if name not in self._dots:
            body = self._computation(name)
            # A computation that calls itself ends in a RecursionError.
            self._dots[name] = _together([self._dots_of(line, body) for line in body.values()])
        return self._dots[name]

    def _place(self, line: _Line) -> str:
        """Where most instructions of a fusion lie; of others the place of its own."""
        found = _PLACE.search(line.text)
        own = found[1] if found else ""
        if line.opcode != "fusion":
            return own
        places = [place for name in hlo.callees(line.text) for place in self._places_in(name)]
        # Of two that are as common, that of the fusion itself, which XLA takes from its root.
        scopes = Counter(_scope(place) for place in places if place)
        if not scopes or scopes[_scope(own)] == max(scopes.values()):
            return own
        common = max(scopes, key=scopes.get)
        return next(place for place in places if _scope(place) == common)

    def _places_in(self, name: str) -> list[str]:
        if name not in self._places:
            lines = self._computation(name).values()
            work = [line for line in lines if line.opcode not in _FREE | {"broadcast"}]
            self._places[name] = [self._place(line) for line in work]
        return self._places[name]

    def _fused_bytes(self, line: _Line, body: dict[str, _Line]) -> int:
        """What a fusion reads of its operands and writes: what its computation uses of them."""
        called = hlo.callees(line.text)
        if len(called) != 1:
            return _bytes(line, body)
        inner = self._computation(called[0])
        users: dict[str, list[_Line]] = {}
        for one in inner.values():
            for operand in dict.fromkeys(one.operands):
                users.setdefault(operand, []).append(one)
        total = 0
        for one in inner.values():
            if one.opcode == "parameter":
                total += min(_size(one.shape), _read_of(one, users, inner))
            if one.root:
                total += _written(one, inner)
        return total


def _scope(place: str) -> str:
    """A place without the name of the primitive."""
    return place.rpartition("/")[0]


def _together(dots: list[_Dots]) -> _Dots:
    best = max(dots, key=lambda d: d.largest, default=_Dots(0, 0, ""))
    return best._replace(flops=sum(d.flops for d in dots))


def _dot_flops(line: _Line, body: dict[str, _Line]) -> int:
    if not line.operands or line.operands[0] not in body:
        raise ValueError(f"operands of the dot {shown(line.name)} are not there")
    arrays = hlo.ARRAY.findall(line.shape), hlo.ARRAY.findall(body[line.operands[0]].shape)
    if any(len(array) != 1 for array in arrays):
        raise ValueError(f"the dot {shown(line.name)} is not of arrays")
    result, left = ([int(n) for n in array[0][1].split(",") if n] for array in arrays)
    named = _CONTRACTED.search(line.text)
    axes = [int(n) for n in named[1].split(",") if n] if named else []
    if any(axis >= len(left) for axis in axes):
        raise ValueError(f"the dot {shown(line.name)} sums over axes that are not there")
    return 2 * math.prod(result) * math.prod(left[axis] for axis in axes)


def _bytes(line: _Line, body: dict[str, _Line]) -> int:
    """Bytes that an instruction outside of a fusion reads and writes."""
    sizes = [_size(body[name].shape) if name in body else 0 for name in line.operands]
    if line.opcode in _READING_PARTS:
        sizes[:1] = [_size(line.shape)]
    if line.opcode in _WRITING_PARTS:
        sizes[:1] = []
    return sum(sizes) + _written(line, body)


def _written(line: _Line, body: dict[str, _Line]) -> int:
    """Bytes of a result: of a tuple its parts, of an update in place what is updated."""
    if line.opcode == "tuple":
        parts = [body[name] for name in line.operands if name in body]
        return sum(_updated(part, body) for part in parts)
    return _updated(line, body)


def _updated(line: _Line, body: dict[str, _Line]) -> int:
    update = _WRITING_PARTS.get(line.opcode, len(line.operands))
    if update < len(line.operands) and line.operands[update] in body:
        return _size(body[line.operands[update]].shape)
    return _size(line.shape)


def _read_of(line: _Line, users: dict[str, list[_Line]], body: dict[str, _Line]) -> int:
    """Bytes that the users of a value read of it."""
    total = 0
    for user in users.get(line.name, []):
        first = user.operands[:1] == [line.name] and line.name not in user.operands[1:]
        if user.opcode == "bitcast" and len(user.operands) == 1:
            total += _read_of(user, users, body)
        elif first and user.opcode in _READING_PARTS:
            total += _size(user.shape)
        elif not (first and user.opcode in _WRITING_PARTS):
            total += _size(line.shape)
    return total
