"""Compares two models on the items of tasks that both have answered.

python -m launch.compare A.json[,A2.json...] B.json[,B2.json...] [--score=NAME] [--json]

The files are those of launch.evaluate --tasks_output: {"tasks": {NAME: {"items": [{"id": ...,
"score": 0.0}, ...]}}}. --score names another field of the items, such as acc_norm. More files of a
model are its runs with other seeds, in the same order for both: then the intervals are for other
seeds as well as for other items. --confidence is that of the intervals of all tasks together.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from absl import flags

from launch import command
from lm import strict_json
from lm.errors import InputError, shown
from lm.studies import items

_SCORE = flags.DEFINE_string("score", "score", "Field of the items that is compared.")
_CONFIDENCE = flags.DEFINE_float("confidence", 0.95, "Of the intervals of all tasks together.")

_MOST_BYTES = 256 * 2**20
_MOST_FILES = 1000

# Task -> id -> score.
Scores = dict[str, dict[str, float]]


def main(first: str = "", second: str = "") -> None:
    """Prints one line a task, or one JSON object."""
    if not first or not second:
        raise InputError("give two models: A.json[,A2.json...] B.json[,B2.json...]")
    if not 0 < _CONFIDENCE.value < 1:
        raise InputError(f"--confidence={_CONFIDENCE.value} must be between 0 and 1")
    models = [[Path(name) for name in given.split(",")] for given in (first, second)]
    found, left_out = compare(*models, _CONFIDENCE.value, _SCORE.value)
    if command.JSON.value:
        content = {name: one._asdict() | {"verdict": one.verdict} for name, one in found.items()}
        print(strict_json.dumps({"tasks": content, "left_out": left_out}))
        return
    print("\n".join(_lines(found, left_out, _CONFIDENCE.value)))


def compare(
    first: Sequence[Path], second: Sequence[Path], confidence: float = 0.95, field: str = "score"
) -> tuple[dict[str, items.Difference], list[str]]:
    """Task -> difference, and the tasks that are not in all files.

    Raises:
      InputError: a file is of another form, other items, or no common task.
    """
    if len(first) != len(second):
        raise InputError(
            f"{len(first)} and {len(second)} files: runs are compared seed by seed; give as many "
            "of both models"
        )
    if len(first) > _MOST_FILES:
        raise InputError(f"{len(first):,} files a model are too many; valid: up to {_MOST_FILES:,}")
    paths = [*first, *second]
    scores = [read(path, field) for path in paths]
    names = list(dict.fromkeys(name for one in scores for name in one))
    common = [name for name in names if all(name in one for one in scores)]
    if not common:
        raise InputError(f"no task is in all files; {paths[0]} has {', '.join(scores[0])}")
    found = {}
    for name in common:
        table = _aligned(name, paths, [one[name] for one in scores])
        halves = np.split(table, 2)
        found[name] = items.compare(*halves, len(common), confidence)
    return found, [name for name in names if name not in common]


def read(path: Path, field: str = "score") -> Scores:
    """The scores of a file: this field of its items.

    Raises:
      InputError: missing, too large, or of another form; one line that names the place.
    """
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise InputError(f"{path}: {size:,} bytes are too many; valid: up to {_MOST_BYTES:,}")
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {shown(str(error))}") from None
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not tasks:
        raise InputError(f"{path}: no file of launch.evaluate --tasks: it has no tasks")
    return {
        name: _items(task, field, f"{path}: task {shown(name)}") for name, task in tasks.items()
    }


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _items(task: Any, field: str, where: str) -> dict[str, float]:
    listed = task.get("items") if isinstance(task, dict) else None
    if not isinstance(listed, list) or len(listed) < 2:
        raise InputError(f"{where}: needs a list of at least two items")
    found: dict[str, float] = {}
    for i, item in enumerate(listed):
        name = item.get("id") if isinstance(item, dict) else None
        if type(name) not in (str, int):
            raise InputError(f"{where}: items[{i}] needs an id, a string or a whole number")
        key = strict_json.dumps(name)  # 1 is not "1"
        if key in found:
            raise InputError(f"{where}: items[{i}] has the id {shown(name)} of an item before it")
        found[key] = _score(item.get(field), field, f"{where}: items[{i}]")
    return found


def _score(value: Any, field: str, where: str) -> float:
    try:
        score = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{where} needs {field}, a finite number, and has {shown(value)}")
    return score


def _aligned(name: str, paths: Sequence[Path], scores: Sequence[Mapping[str, float]]) -> np.ndarray:
    """[files, items], the items in the order of the first file."""
    order = list(scores[0])
    for path, one in zip(paths, scores, strict=True):
        if one.keys() != scores[0].keys():
            other = next(iter(one.keys() ^ scores[0].keys()))
            raise InputError(
                f"{path}: task {shown(name)} has other items than {paths[0]}: {shown(other)} is "
                "in one of them alone"
            )
    return np.array([[one[key] for key in order] for one in scores])


def _lines(
    found: Mapping[str, items.Difference], left_out: Sequence[str], confidence: float
) -> list[str]:
    head = ["task", "items", "seeds", "difference", "standard error", "interval", "scores of B"]
    rows = [
        [
            shown(name),
            f"{one.items:,}",
            str(one.seeds),
            f"{one.mean:+.4f}",
            f"{one.standard_error:.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}",
            one.verdict,
        ]
        for name, one in found.items()
    ]
    count = len(found)
    level = 1 - (1 - confidence) / count
    seeds = next(iter(found.values())).seeds
    scope = "other seeds and other items" if seeds > 1 else "other items, and this seed alone"
    notes = [
        f"B minus A, item by item; intervals at {level:.2%} ({count} task{'s' * (count > 1)}), "
        f"for {scope}"
    ]
    if left_out:
        notes.append(f"not in all files: {', '.join(map(shown, left_out))}")
    return [*command.table(head, rows), *notes]


if __name__ == "__main__":
    command.run(main, most=2)
