"""A part of the test suite on the device."""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_rows import Given, Rows

_ROOT = Path(__file__).parent.parent

FILES = (
    "tests/model/test_attention.py",
    "tests/objectives/test_cross_entropy.py",
    "tests/model/test_transformer.py",
    "tests/training/test_optimizers.py",
    "tests/objectives/losses/test_each_loss.py",
    "tests/objectives/losses/test_loss_values.py",
    "tests/model/test_decoding.py",
)
# Tests that want several devices, or read what the compiler for CPU makes.
_NOT = "sharded or spread or not_merged or memory or no_array or in_place or costs or recomputes"

_ENDED = re.compile(r"(tests/\S+\.py)::(.+?) (PASSED|FAILED|ERROR|SKIPPED)")
_ENDED_BY_A_WORKER = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+\.py)::(.+)")


def tests(given: Given) -> Rows:
    """`FILES` on the device, or the first of them on CPU."""

    def row():
        if given.toy:
            return run(given, "cpu", FILES[:1], workers=0)
        return run(given, "cuda,cpu", FILES, workers=6)

    return {"files": row}


def run(given: Given, platform: str, files: Sequence[str], workers: int) -> dict[str, object]:
    """Counts of pytest and what failed.

    Args:
      given: of the section; pytest is stopped shortly before the deadline.
      platform: of NIBBLE_TEST_PLATFORM, see tests/conftest.py.
      files: of tests.
      workers: processes, where pytest-xdist is installed; 0 is none.
    """
    ask = [sys.executable, "-m", "pytest", "-vv", "-rfE", "--tb=line", "-k", f"not ({_NOT})"]
    # The warnings of other versions of JAX are no failures here.
    ask += ["-W", "ignore::DeprecationWarning", "-W", "ignore::PendingDeprecationWarning"]
    ask += ["-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist"):
        ask += ["-n", str(workers)]
    else:
        # An option of the repository's that belongs to pytest-xdist.
        ask += ["-o", "addopts=-q -m 'not slow'"]
    # A file, since workers that are still compiling would keep a pipe open.
    with tempfile.TemporaryFile() as out:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ask,
                cwd=_ROOT,
                env={**os.environ, "NIBBLE_TEST_PLATFORM": platform},
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, given.deadline - time.monotonic() - 2),
                check=False,
            )
        out.seek(0)
        return ended(out.read().decode(errors="replace"))


def ended(out: str) -> dict[str, object]:
    """What pytest -vv -rfE has printed, with or without workers: counts by file, and what failed.

    `error` is there where it did not come to its end.
    """
    counts = {}
    for line in out.splitlines():
        if found := _ENDED_BY_A_WORKER.search(line):
            kind, file, _ = found.groups()
        elif found := _ENDED.search(line):
            file, _, kind = found.groups()
        else:
            continue
        # The summary at the end names failures again.
        if not line.startswith(("FAILED", "ERROR")):
            of_file = counts.setdefault(file, {})
            of_file[kind.lower()] = of_file.get(kind.lower(), 0) + 1
    failures = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
    total = {k: sum(c.get(k, 0) for c in counts.values()) for k in ("passed", "failed", "skipped")}
    found = {**total, "by_file": counts, "failures": failures}
    if re.search(r"\d+ (passed|failed|skipped|errors?)\b.* in [\d.]+s", out):
        return found
    return {**found, "error": f"pytest did not come to its end: {out[-1000:]}"}
