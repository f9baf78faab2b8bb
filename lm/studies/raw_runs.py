"""The metrics of all runs of a study in one compressed file, STUDY.jsonl.gz.

A line of it is a line of a run's metrics.jsonl with two fields before the others: the variant and
the seed of the run. Files with the same content are equal byte for byte.
"""

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import strict_json
from lm.errors import InputError

SUFFIX = ".jsonl.gz"

# (variant, seed) -> lines of metrics.jsonl.
Runs = Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]


def encode(runs: Runs) -> bytes:
    """The content of the file."""
    text = "".join(
        strict_json.dumps({"variant": variant, "seed": seed, **line}) + "\n"
        for (variant, seed), lines in runs.items()
        for line in lines
    )
    buffer = io.BytesIO()
    # The header would hold the name of a file and the time.
    with gzip.GzipFile("", "wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    return buffer.getvalue()


def read(path: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(variant, seed) -> lines of metrics.jsonl, in the order of the file.

    Raises:
      InputError: no such file, or it is damaged.
    """
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for text in _lines(path):
        try:
            line = strict_json.loads(text)
            runs.setdefault((line.pop("variant"), line.pop("seed")), []).append(line)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: no file of launch.results --collect: {error!r}") from None
    return runs


def select(path: Path, variant: str | None = None, seed: int | None = None) -> Iterable[str]:
    """Lines of the file, as text: all, or those of a variant, of a seed, or of both.

    Raises:
      InputError: as `read`, or there is no such run.
    """
    runs = read(path)
    for name, place, wanted in (("variant", 0, variant), ("seed", 1, seed)):
        valid = list(dict.fromkeys(str(run[place]) for run in runs))
        if wanted is not None and str(wanted) not in valid:
            raise InputError(f"--{name}={wanted}: {path} has none; valid: {', '.join(valid)}")
    chosen = [run for run in runs if variant in (None, run[0]) and seed in (None, run[1])]
    if not chosen:
        raise InputError(f"{path} has no run of --variant={variant} with --seed={seed}")
    return (
        strict_json.dumps({"variant": run[0], "seed": run[1], **line}) + "\n"
        for run in chosen
        for line in runs[run]
    )


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: damaged: {error}") from None
