"""A made task as a corpus: `task:NAME[:ARGUMENT=NUMBER...][/COUNT]`, as task:sums:digits=3/20000.

Every problem is a function of the seed and the number of its draw. Draws are gone through in order,
and those with a prompt that there has been before are left out. So no two documents have the same
prompt, and none that is held out, by a hash of the prompt, is in the training split, whatever the
count, the seed and the other tasks of a mixture.
"""

import difflib
import functools
import hashlib
import inspect
import re
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lm.data.documents import Corpus, Document
from lm.data.hashing import Fingerprint, held_out
from lm.data.tasks import TASKS
from lm.data.tasks.task import Draw, Made, Task
from lm.errors import InputError, shown

PREFIX = "task:"

# Problems where the name does not say how many, and the most that can be asked for.
COUNT = 10_000
_MOST = 1_000_000

# Draws in a row without a new prompt after which a task counts as used up.
_MOST_REPEATED = 1000

_WORDS = r"task:(?P<name>[^:/]*)(?P<options>(?::[^:/]*)*)(?:/(?P<count>[^/]*))?"


class _Spec(NamedTuple):
    """What a name of a corpus says."""

    name: str
    options: tuple[tuple[str, int], ...]
    seed: int
    count: int | None


class _Index(NamedTuple):
    """Of every document its draw and whether it is held out; the fingerprint of each split."""

    draws: np.ndarray
    held_out: np.ndarray
    fingerprints: dict[str, str]


def load_task(corpus: str, split: str, validation_fraction: float) -> Corpus:
    """Makes one split of a task.

    Args:
      corpus: `task:NAME`, then arguments of the task, as `:digits=3`, and `:seed=1` for other
        problems, then `/COUNT` for how many there are. Without a count there are `COUNT`, or as
        many different ones as the task has.
      split: `train` or `validation`.
      validation_fraction: the share of problems that is held out.

    Raises:
      InputError: there is no such task, argument or count, or the task has fewer problems.
    """
    spec = _read(corpus)
    index = _index(spec, validation_fraction, corpus)
    chosen = index.draws[index.held_out == (split == "validation")]
    return Corpus(corpus, _Problems(spec, chosen), index.fingerprints[split], 0, "problems")


class _Problems(Sequence):
    """The documents of a task: one a draw, made when it is asked for."""

    def __init__(self, spec: _Spec, draws: np.ndarray):
        self._spec, self._draws = spec, draws

    def __len__(self) -> int:
        return len(self._draws)

    def __getitem__(self, index: int) -> Document:
        draw = int(self._draws[index])  # Raises IndexError, which ends iteration.
        made = _made(_task(self._spec), self._spec.seed, draw)
        record = {"prompt": made.prompt, "answer": made.answer, **made.further}
        return Document(made.prompt, ((made.prompt, 0.0), (made.answer, 1.0)), record=record)


@functools.lru_cache(maxsize=8)
def _index(spec: _Spec, validation_fraction: float, corpus: str) -> _Index:
    task, wanted = _task(spec), spec.count or COUNT
    draws, held, seen = array("q"), array("b"), set()
    digests = {"train": Fingerprint(), "validation": Fingerprint()}
    draw = repeated = 0
    while len(draws) < wanted and repeated < _MOST_REPEATED:
        made = _made(task, spec.seed, draw)
        key = made.prompt.encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        repeated = repeated + 1 if digest in seen else 0
        if not repeated:
            seen.add(digest)
            draws.append(draw)
            held.append(held_out(key, validation_fraction))
            of_split = digests["validation" if held[-1] else "train"]
            of_split.add(key)
            of_split.add(made.answer.encode())
        draw += 1
    if spec.count and len(draws) < spec.count:
        arguments = ", ".join(inspect.signature(TASKS[spec.name]).parameters)
        raise InputError(
            f"data.corpus {corpus!r}: has only about {len(draws):,} different problems; valid: a "
            f"smaller count, or more to draw from ({arguments})"
        )
    fingerprints = {split: digest.hexadecimal() for split, digest in digests.items()}
    return _Index(np.array(draws, np.int64), np.array(held, bool), fingerprints)


def _made(task: Task, seed: int, draw: int) -> Made:
    # Far fewer draws than 2^40 are ever made, so that no two seeds share one.
    return task(Draw((seed << 40) + draw))


@functools.lru_cache(maxsize=32)
def _task(spec: _Spec) -> Task:
    return TASKS[spec.name](**dict(spec.options))


def _read(corpus: str) -> _Spec:
    where = f"data.corpus {shown(corpus)!r}"
    found = re.fullmatch(_WORDS, corpus)
    if not found:
        raise InputError(f"{where}: must be task:NAME[:ARGUMENT=NUMBER...][/COUNT]")
    name = found["name"]
    if name not in TASKS:
        raise InputError(f"{where}: {_unknown('task', name, TASKS)}")
    valid = ("seed", *inspect.signature(TASKS[name]).parameters)
    options = {}
    for option in found["options"].split(":")[1:]:
        key, _, value = option.partition("=")
        if key not in valid:
            raise InputError(f"{where}: {_unknown('argument', key, valid)}")
        if key in options:
            raise InputError(f"{where}: has {key} twice")
        options[key] = _number(value, f"{where}: {key}", 0, 2**31 - 1)
    count = found["count"]
    count = None if count is None else _number(count, f"{where}: the count", 1, _MOST)
    seed = options.pop("seed", 0)
    spec = _Spec(name, tuple(sorted(options.items())), seed, count)
    try:
        _task(spec)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return spec


def _number(text: str, what: str, least: int, most: int) -> int:
    # The length first: int() of very many digits takes very long.
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise InputError(
            f"{what} must be a whole number from {least} to {most}, got {shown(text)!r}"
        )
    return int(text)


def _unknown(what: str, name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f"no {what} {shown(name)!r}, did you mean {near[0]!r}? Valid are {', '.join(names)}"
