r"""One run that checks and measures everything on one NVIDIA H100 or H200, in at most 8 minutes.

bash benchmarks/gpu.sh [--wheels=FOLDER] [--output=FOLDER] [--toy]

Every section of benchmarks/gpu_sections.py is a process of its own with a limit of seconds: one
that fails, hangs or runs out of memory is recorded, and the others go on. FOLDER, ./gpu_results by
default, gets gpu.json and gpu.txt, which are written anew after each section. --toy is the same
path on CPU, with toy sizes.

Packages that are missing are taken from the wheels of a folder, or installed by pip where none is
named; what is installed already stays as it is. docs/speed.md says which wheels those are.
"""

import argparse
import datetime
import importlib.metadata
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

# Nothing that may be missing before `install` has run.
from lm import strict_json
from lm.errors import InputError

_ROOT = Path(__file__).parent.parent
_SECONDS = 470  # of all
_TOY_SECONDS = 3000  # on a CPU that others may use, too

# Section -> seconds that it may take for certain. What one leaves is there for the next ones.
BUDGETS = {
    "machine": 30,
    "step 350m": 70,
    "step 1.3b": 80,
    "loss": 45,
    "tests": 60,
    "attention": 35,
    "variants": 50,
    "decoding": 35,
    "profile": 35,
    "fp8": 30,
}

# What must be importable for the sections.
_IMPORTS = "import pytest, launch.command, lm.planning.benchmark"


class _Parser(argparse.ArgumentParser):
    """One line and exit code 2, as for bad input everywhere."""

    def error(self, message: str) -> None:
        raise InputError(message)


def main() -> int:
    """Returns 1 where a section, a row or a test failed, else 0."""
    started = time.monotonic()
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="Folder of wheels for what is missing.")
    parser.add_argument("--output", type=Path, default=Path("gpu_results"), help="Folder.")
    parser.add_argument("--toy", action="store_true", help="Toy sizes, on CPU.")
    arguments = parser.parse_args()
    if arguments.wheels and not list(arguments.wheels.glob("*.whl")):
        raise InputError(f"--wheels={arguments.wheels}: a folder with .whl files is needed")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        environment = _environment(scratch, arguments.toy)
        installed = install(arguments.wheels, scratch / "site", environment)
        sys.path.insert(0, str(scratch / "site"))
        if not arguments.toy:
            _check_device(environment)
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "toy": arguments.toy,
            "commit": _commit(),
            "python": sys.version.split()[0],
            "packages": _versions([str(scratch / "site"), *sys.path]),
            "installed": installed,
            "sections": {},
        }
        seconds = _TOY_SECONDS if arguments.toy else _SECONDS
        return _measure(record, arguments, scratch, environment, started + seconds)


def _measure(
    record: dict[str, Any],
    arguments: argparse.Namespace,
    scratch: Path,
    environment: dict[str, str],
    deadline: float,
) -> int:
    from benchmarks import gpu_report  # imports what may have been missing

    sections = record["sections"]
    for name in BUDGETS:
        limit = seconds_for(name, deadline - time.monotonic())
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        options = [f"--{k}={v}" for k, v in _limits(sections).items()]
        options += ["--toy"] * arguments.toy
        sections[name] = run(name, limit, options, scratch, environment)
        text = "\n".join(gpu_report.lines(record)) + "\n"
        (arguments.output / "gpu.json").write_text(strict_json.dumps(record, indent=1) + "\n")
        (arguments.output / "gpu.txt").write_text(text)
    print(text, end="")
    failed = failures(sections)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


def failures(sections: dict[str, Any]) -> list[str]:
    """What has failed, one line each: sections that ended early, rows with an error, and tests.

    Rows for which no time was left have not failed, except for the tests.
    """
    found = []
    for name, section in sections.items():
        found += [f"section {name}"] * bool(section["error"])
        found += [
            f"{name}, {row}" for row, figures in section["rows"].items() if "error" in figures
        ]
    tests = sections["tests"]["rows"].get("files", {})
    if "error" not in tests and tests.get("failed", 1):
        found.append("tests, files: tests failed" if "failed" in tests else "tests: none were run")
    return found


def seconds_for(name: str, left: float) -> float:
    """Seconds that a section may take when `left` are left.

    That is all but the budgets of later sections; its share, where not even that much is left.
    """
    names = list(BUDGETS)
    later = sum(BUDGETS[other] for other in names[names.index(name) + 1 :])
    share = left * BUDGETS[name] / (BUDGETS[name] + later)
    return max(1.0, share, left - later)


def run(
    name: str, limit: float, options: list[str], scratch: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """One section in a process of its own.

    Returns:
      `seconds`; `error`, None or what ended the process; and `rows`, those that were written.
    """
    start = time.monotonic()
    path, log = scratch / f"{name}.json", scratch / f"{name}.log"
    # Less what it takes to import JAX: rows should end before the process is stopped.
    ask = [sys.executable, "-m", "benchmarks.gpu_sections", name, str(path)]
    ask += [f"--seconds={max(1.0, limit - 8):.1f}", *options]
    with log.open("w") as file:
        child = subprocess.Popen(
            ask, cwd=_ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = child.wait(limit)
            error = None if code == 0 else f"exit code {code}: {_end(log)}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:.0f} s: {_end(log)}"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    rows = strict_json.loads(path.read_text()) if path.exists() else {}
    return {"seconds": time.monotonic() - start, "error": error, "rows": rows}


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


def _limits(sections: dict[str, Any]) -> dict[str, float]:
    """Peak and bandwidth, as far as they have been measured."""
    peaks = sections.get("machine", {}).get("rows", {}).get("peaks", {})
    found = {"peak": peaks.get("peak_flops"), "bandwidth": peaks.get("bandwidth")}
    return {name: value for name, value in found.items() if value and math.isfinite(value)}


def _environment(scratch: Path, toy: bool) -> dict[str, str]:
    """That of the sections: one cache for what they compile, and most of the device's memory."""
    paths = [str(scratch / "site"), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    found = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    if toy:
        found["JAX_PLATFORMS"] = "cpu"
        found.pop("XLA_FLAGS", None)  # one device, not those of tests
    return found


def install(wheels: Path | None, site: Path, environment: dict[str, str]) -> list[str]:
    """Makes the imports of the sections possible.

    Args:
      wheels: folder of wheels; those of packages that are missing are installed, without asking
        for what they need. Without a folder, pip installs the extras gpu and test, from wherever
        it is configured to.
      site: where wheels are installed: a folder for this run alone.
      environment: of the sections.

    Returns:
      What was installed.

    Raises:
      InputError: something is missing still.
    """
    if _importable(environment) is None:
        return []
    if wheels:
        chosen = [path for path in sorted(wheels.glob("*.whl")) if not _is_installed(path)]
        what = ["--no-index", "--no-deps", "--target", str(site), *map(str, chosen)]
    else:
        chosen = [Path(".[gpu,test]")]
        what = ["-e", ".[gpu,test]"]
    if chosen:
        ask = [sys.executable, "-m", "pip", "install", "--quiet", *what]
        done = subprocess.run(ask, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(
                f"pip install {' '.join(what)}: {' '.join(done.stderr.split())[-500:]}"
            )
    if problem := _importable(environment):
        raise InputError(f"{problem}; name a folder with its wheel: --wheels=FOLDER")
    return [path.name for path in chosen]


def _importable(environment: dict[str, str]) -> str | None:
    """None, or why the sections cannot be imported."""
    ask = [sys.executable, "-c", _IMPORTS]
    done = subprocess.run(
        ask, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return (done.stderr.strip().splitlines() or ["no import"])[-1] if done.returncode else None


def _is_installed(wheel: Path) -> bool:
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_device(environment: dict[str, str]) -> None:
    """Refuses a machine where JAX has no GPU."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(
        ask, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.stdout.strip() != "gpu":
        found = done.stdout.strip() or (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise InputError(f"JAX finds no GPU here but: {found}; --toy runs toy sizes on CPU")


def _versions(path: list[str]) -> dict[str, str]:
    """Package -> version, of what this repository and JAX on a GPU need; "" where it is missing."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", line)[0] for line in project["dependencies"]]
    names += ["jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "pytest"]
    found = dict.fromkeys(names, "")
    for name in names:
        for one in importlib.metadata.distributions(name=name, path=path):
            found[name] = found[name] or one.version
    return found


def _commit() -> str:
    """The commit of this code, "" outside of a repository."""
    ask = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--abbrev=7"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the section, too
    try:
        sys.exit(main())
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
