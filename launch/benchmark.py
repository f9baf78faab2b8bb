"""How fast this machine trains: whole steps and their pieces, as fractions of what it can do.

python -m launch.benchmark [--json] > before.json
python -m launch.benchmark --compare before.json after.json
"""

import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from launch import command
from lm import strict_json
from lm.errors import InputError

_SHAPES = flags.DEFINE_list(
    "shapes", "tiny,small,tiny_50k,small_50k", "Train steps to time, of configs/benchmark.py."
)
_PIECES = flags.DEFINE_list("pieces", None, "Pieces to time; all by default, none if empty.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timings of each item.")
_START_UP = flags.DEFINE_bool("start_up", True, "Time launch.train to its first step, too.")
_COMPARE = flags.DEFINE_string("compare", None, "A.json B.json: what changed from A to B.")

_ROOT = Path(__file__).parent.parent
_CONFIG = _ROOT / "configs" / "benchmark.py"

# Steps after which a process holds what it will hold while it trains.
_SETTLED = 5


def main(other: str | None = None) -> None:
    """Measures and prints, or compares two measurements."""
    if _COMPARE.value:
        if other is None:
            raise InputError("--compare takes two files: --compare A.json B.json")
        print("\n".join(compare(_read(_COMPARE.value), _read(other))))
        return
    if other is not None:
        raise InputError(f"unknown argument {other!r}: flags start with --")
    if _REPEATS.value < 1:
        raise InputError(f"--repeats={_REPEATS.value} must be at least 1")
    record = _measure()
    print(strict_json.dumps(record) if command.JSON.value else "\n".join(_lines(record)))


def _measure() -> dict[str, Any]:
    configs = {name: _config(name) for name in _SHAPES.value if name}
    if not configs:
        raise InputError("--shapes is empty; the pieces take their sizes from a shape")
    # Loads JAX, but leaves the accelerator alone.
    from lm.planning import benchmark, timing
    from lm.planning.plan import as_dict
    from lm.training import experiment

    wanted = [x for x in _PIECES.value if x] if _PIECES.present else list(benchmark.PIECES)
    for name in wanted:
        if name not in benchmark.PIECES:
            hint = command.nearest(name, list(benchmark.PIECES))
            raise InputError(f"--pieces={name} is unknown{hint}")
    # Before this process takes the accelerator, which belongs to one at a time.
    started = {name: _start_up(name, c) for name, c in configs.items()} if _START_UP.value else {}
    load = os.getloadavg()[0]
    command.use_compilation_cache()
    import jax

    runs = {name: experiment.build(c, c.data.vocab_size) for name, c in configs.items()}
    with jax.set_mesh(next(iter(runs.values())).mesh):
        reference = benchmark.machine(c.model.dtype for c in configs.values())
        items = benchmark.collect(runs, wanted)
        everything = [*reference, *items]
        command.say(f"timing {len(everything)} items, {_REPEATS.value} times each")
        seconds = timing.measure(everything, _REPEATS.value)
        limits = timing.limits(reference, seconds)
        if command.PROFILE.value:
            with jax.profiler.trace(command.PROFILE.value):
                for item in items:
                    with jax.profiler.TraceAnnotation(item.name):
                        jax.block_until_ready(item.run())
    record = {
        "machine": {
            "date": datetime.date.today().isoformat(),
            "commit": _commit(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "load_before": load,
            "peak_flops": limits.flops,
            "bandwidth": limits.bandwidth,
        },
        "items": {
            item.name: as_dict(timing.figure(item, seconds[item.name], limits)) for item in items
        },
        "start_up": started,
    }
    if command.PROFILE.value:
        _write_beside_trace(command.PROFILE.value, record["machine"], items)
    return record


def _write_beside_trace(folder: str, machine: dict[str, Any], items: list[Any]) -> None:
    """What launch.plan --profile reads a trace with: the limits, and the programs of the steps."""
    from lm.planning import instructions

    command.write_text(Path(folder) / "machine.json", strict_json.dumps(machine) + "\n")
    for item in items:
        if item.program:
            path = instructions.path(folder, item.name)
            path.parent.mkdir(exist_ok=True)
            command.write_text(path, item.program())


def _config(name: str) -> ConfigDict:
    try:
        return command.load_config(_CONFIG, name)
    except LookupError as error:
        raise InputError(f"--shapes={name}: {error.args[0]}") from None


def _start_up(name: str, config: ConfigDict) -> dict[str, float]:
    """Seconds from process to first finished step, and the most memory held by its fifth step.

    This is launch.train itself, on the default corpus: once with an empty compilation cache and
    twice with what that left behind, of which the faster counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = _tokenizer_options(config.data.vocab_size, folder / "tokenizer.json")
        times, memory = [], []
        for turn in ("cold", "warm", "warm"):
            command.say(f"start-up of {name}, {turn} cache")
            seconds, size = _first_step(name, options, folder)
            times.append(seconds)
            memory.append(size)
    return {"cold_seconds": times[0], "warm_seconds": min(times[1:]), "peak_bytes": max(memory)}


def _first_step(name: str, options: list[str], folder: Path) -> tuple[float, int]:
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    arguments = ["-m", "launch.train", f"--config={_CONFIG}:{name}", f"--workdir={workdir}"]
    # One process, so that its clock and its memory are all of it.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments, *options, "--config.train.log_every=1"],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    first, said = None, []
    for line in child.stderr:
        said.append(line)
        if line.startswith("step 1/"):
            first = time.perf_counter() - start
        if line.startswith(f"step {_SETTLED}/"):
            break
    # Not child.kill(), which would collect a child that has ended, and its usage with it.
    os.kill(child.pid, signal.SIGKILL)
    usage = os.wait4(child.pid, 0)[2]
    child.returncode = 0
    child.stderr.close()
    if first is None:
        raise InputError(f"launch.train of {name} ended before its first step: {said[-1:]}")
    return first, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tokenizer_options(entries: int, path: Path) -> list[str]:
    """Flags of a real tokenizer with that number of entries, the bytes and pairs of bytes."""
    if entries <= 257:
        return ["--config.data.vocab_size=0"]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: entries - len(letters) - 1]
    if len(letters) + len(pairs) + 1 < entries:
        raise InputError(f"no start-up of {entries} entries: 257 and pairs of bytes are fewer")
    tokens = [*letters, *("".join(pair) for pair in pairs)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    path.write_text(made.to_str())
    return [f"--config.data.tokenizer={path}"]


def _commit() -> str:
    """The commit of this code, "" outside of a repository; with + when it was changed since."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        ask = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=+", "--abbrev=7"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def _lines(record: dict[str, Any]) -> list[str]:
    m, items = record["machine"], record["items"]
    peaks = ", ".join(f"{dtype} {flops / 1e9:,.0f}" for dtype, flops in m["peak_flops"].items())
    rows = [
        [
            name,
            f"{1e3 * x['seconds']:.2f}",
            f"{1e3 * x['lower']:.2f} to {1e3 * x['upper']:.2f}",
            f"{x['tokens_per_second']:,.0f}" if x["tokens_per_second"] else "",
            f"{x['fraction']:.3f}",
            x["bound"],
            x["formula"],
        ]
        for name, x in items.items()
    ]
    head = ["", "ms", "quartiles", "tokens/s", "of limit", "limit", "FLOPs; bytes"]
    lines = [
        f"{m['devices']} x {m['device']}, {m['cores']} cores, jax {m['jax']}, {m['date']}, "
        f"commit {m['commit']}, load before {m['load_before']:.1f}",
        f"peak of products: {peaks} GFLOP/s; memory: {m['bandwidth'] / 1e9:.1f} GB/s",
        "",
        *command.table(head, rows),
    ]
    steps = [x["tokens_per_second"] for name, x in items.items() if name.startswith("step ")]
    for name, x in items.items():
        if base := items.get(_twin(name)):
            lines.append(
                f"{name}: {x['seconds'] / base['seconds']:.2f} x the time of {_twin(name)}"
            )
        if name.startswith("data pipeline"):
            times = x["tokens_per_second"] / max(steps)
            lines.append(f"{name}: {times:.0f} x the tokens/s of the fastest step")
    if record["start_up"]:
        rows = [
            [
                name,
                f"{x['warm_seconds']:.1f}",
                f"{x['cold_seconds']:.1f}",
                f"{x['peak_bytes'] / 1e9:.2f}",
            ]
            for name, x in record["start_up"].items()
        ]
        head = ["first step of launch.train after", "s, warm cache", "s, cold", "GB at most"]
        lines += ["", *command.table(head, rows)]
    return lines


def _twin(name: str) -> str:
    """The item that another one is a change of; no item, where there is none."""
    if name.startswith("variant ") and name != "variant plain":
        return "variant plain"
    return f"dense {name}" if name.startswith("cross-entropy") else ""


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What changed from A to B beyond noise, as lines of a table.

    Items are compared by their fraction of the limit that was measured beside them, so that a
    machine that is slower as a whole changes nothing. A change is one that the quartiles of both
    do not share. Start-up, which is measured too seldom for quartiles, has changed by more than a
    fifth, its memory by more than a twentieth.
    """
    rows, same = [], 0
    for name in a["items"].keys() & b["items"].keys():
        x, y = a["items"][name], b["items"][name]
        low, high = (x["limit"] / x[q] for q in ("upper", "lower"))
        if low <= y["limit"] / y["lower"] and y["limit"] / y["upper"] <= high:
            same += 1
            continue
        change = y["fraction"] / x["fraction"] - 1
        rows.append([name, f"{x['fraction']:.3f}", f"{y['fraction']:.3f}", f"{change:+.0%}"])
    for name in a["start_up"].keys() & b["start_up"].keys():
        for key, least in (("warm_seconds", 0.2), ("cold_seconds", 0.2), ("peak_bytes", 0.05)):
            x, y = a["start_up"][name][key], b["start_up"][name][key]
            if abs(y / x - 1) <= least:
                same += 1
                continue
            scale = 1e9 if key == "peak_bytes" else 1
            shown = f"start-up {name} {'GB' if scale > 1 else key}"
            rows.append([shown, f"{x / scale:.2f}", f"{y / scale:.2f}", f"{y / x - 1:+.0%}"])
    head = ["fraction of the limit", "A", "B", "change"]
    unmatched = sorted(a["items"].keys() ^ b["items"].keys())
    return [
        *(command.table(head, sorted(rows)) if rows else ["no change beyond noise"]),
        f"{same} figures are within noise",
        *([f"in one of the two only: {', '.join(unmatched)}"] if unmatched else []),
    ]


def _read(path: str) -> dict[str, Any]:
    try:
        record = strict_json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--compare: {path}: {error}") from None
    if not isinstance(record, dict) or not {"items", "start_up"} <= record.keys():
        raise InputError(f"--compare: {path} is not from launch.benchmark --json")
    return record


if __name__ == "__main__":
    command.run(main, most=1, huge_pages=True)
