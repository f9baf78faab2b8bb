r"""What a checkpoint costs: bytes, seconds that a save holds up the step, and restoring, on Linux.

python benchmarks/checkpoints.py [--shape=small_50k] [--layers=N] [--saves=3] [--folder=DIR] \
    [--json] [--output=FILE.json]

The train state is that of a shape of configs/benchmark.py, such as 1.3b, with another depth by
--layers where the machine cannot hold it. All its numbers are random: a state that has not been
trained is mostly zeros, which take no bytes. The step is a stand-in that reads and writes all of
the state in place, and nothing else. The checkpoint is lm/runs/checkpoints.py's, in a new folder
below --folder that is removed at the end. Restoring is measured in processes of their own, each
after the files have been put out of the page cache, and once with the parameters alone.
"""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from absl import flags

from configs.benchmark import get_config
from launch import command
from lm import strict_json
from lm.errors import InputError

_SHAPE = flags.DEFINE_string("shape", "small_50k", "One of configs/benchmark.py.")
_LAYERS = flags.DEFINE_integer("layers", None, "Layers instead of those of the shape.")
_SAVES = flags.DEFINE_integer("saves", 3, "Saves that are timed.")
_FOLDER = flags.DEFINE_string("folder", None, "Where the checkpoint is written; that of tempfile.")
_PART = flags.DEFINE_enum("part", None, ["save", "all", "parameters"], "What one process measures.")

_GIB = 2**30
_IO = Path("/proc/self/io")
_STEPS = 3  # between two saves, the first of which a save may hold up


def main() -> None:
    """Measures, and prints the table or the record."""
    if _SAVES.value < 1 or (_LAYERS.value is not None and _LAYERS.value < 1):
        raise InputError("--saves and --layers must be at least 1")
    config = _config()
    if not _IO.exists():
        raise InputError(f"{_IO} is missing: this needs Linux, which counts there what is read")
    if _PART.value:
        folder = Path(_FOLDER.value)
        print(strict_json.dumps(measure(config, folder, _PART.value, _SAVES.value)))
        return
    if _FOLDER.value and not Path(_FOLDER.value).is_dir():
        raise InputError(f"--folder={_FOLDER.value} is no folder")
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        record = {part: _in_a_process(part, folder) for part in ("save", "all", "parameters")}
    record = {"shape": _SHAPE.value, "layers": config.model.layers, **record}
    text = strict_json.dumps(record)
    if command.OUTPUT.value:
        command.write_text(Path(command.OUTPUT.value), text + "\n")
    print(text if command.JSON.value else "\n".join(lines(record)))


def _config() -> Any:
    try:
        config = get_config(_SHAPE.value)
    except LookupError as error:
        raise InputError(f"--shape={_SHAPE.value}: {error.args[0]}") from None
    if _LAYERS.value is not None:
        config.model.layers = _LAYERS.value
    return config


def _in_a_process(part: str, folder: str) -> dict[str, Any]:
    """The figures of one part; raises InputError where its process ended early."""
    ask = [sys.executable, __file__, f"--part={part}", f"--folder={folder}"]
    ask += [f"--shape={_SHAPE.value}", f"--saves={_SAVES.value}"]
    ask += [f"--layers={_LAYERS.value}"] if _LAYERS.value is not None else []
    done = subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        held = " (killed: out of memory, most likely)" if done.returncode == -9 else ""
        raise InputError(f"--part={part} ended with exit code {done.returncode}{held}")
    return strict_json.loads(done.stdout.splitlines()[-1])


def measure(config: Any, folder: Path, part: str, saves: int) -> dict[str, Any]:
    """Saves into a folder (`part` is "save"), or restores "all" or the "parameters" from it."""
    import jax

    from lm.training import experiment

    run = experiment.build(config, config.data.vocab_size, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        if part == "save":
            return saving(run.abstract_state(), folder, saves)
        return restoring(run.abstract_state(), folder, None if part == "all" else ("trained",))


def saving(abstract: Any, folder: Path, saves: int) -> dict[str, Any]:
    """Bytes of a checkpoint and seconds of its saves.

    Returns:
      `device`; `state_bytes`, `parameter_bytes`, of the arrays; `disk_bytes`, of the files, and
      `disk_bytes_without_moments`. Medians over the saves, in seconds: `call`, of `save` itself;
      `step` and `step_after_save`, of the stand-in; `blocked`, call + step_after_save - step;
      `copy`, of a copy of all the state on the host, array by array; `write`, from the call until
      the checkpoint has its name. `peak_bytes` that the process has held.
    """
    import jax
    import numpy as np

    state = _random_state(abstract)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + x.dtype.type(1), tree), donate_argnums=0)

    def timed_step():
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(step(state))
        return time.perf_counter() - start

    start = time.perf_counter()
    for leaf in jax.tree.leaves(state):
        np.array(leaf)
    copy = time.perf_counter() - start
    timed_step()  # compiles
    calls, steps, after, writes = [], [], [], []
    checkpoints = _open(folder)
    for number in range(saves):
        steps += [timed_step() for _ in range(_STEPS)]
        start = time.perf_counter()
        checkpoints.save(number, state, _NoData(), {})
        calls.append(time.perf_counter() - start)
        after.append(timed_step())
        checkpoints.wait()
        writes.append(time.perf_counter() - start)
    checkpoints.close()
    files = _files(folder)
    sizes = {path: path.stat().st_size for path in files}
    call, usual, later = median(calls), median(steps), median(after)
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "state_bytes": _bytes(state),
        "parameter_bytes": _bytes(state.trained),
        "disk_bytes": sum(sizes.values()),
        "disk_bytes_without_moments": sum(
            size
            for path, size in sizes.items()
            if "optimizer" not in path.relative_to(folder).parts
        ),
        "saves": saves,
        "call": call,
        "step": usual,
        "step_after_save": later,
        "blocked": call + later - usual,
        "copy": copy,
        "write": median(writes),
        "write_per_gib": median(writes) / (_bytes(state) / _GIB),
        "peak_bytes": _peak(),
    }


def restoring(abstract: Any, folder: Path, fields: Sequence[str] | None) -> dict[str, Any]:
    """Seconds, bytes and memory of one restore, its checksums included.

    Returns:
      `state_bytes`, of the arrays that were restored; `seconds` and `seconds_per_gib` of those;
      `read_bytes`, by system calls; `disk_bytes`, those that were not in the page cache;
      `peak_bytes` that the process has held, and `held_before`, the most until it began.
    """
    import jax

    _forget_pages(folder)
    checkpoints = _open(folder, read_only=True)
    before, held = _io(), _peak()
    start = time.perf_counter()
    state, _ = checkpoints.restore(abstract, fields=fields)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    after = _io()
    checkpoints.close()
    size = _bytes(state)
    return {
        "state_bytes": size,
        "seconds": seconds,
        "seconds_per_gib": seconds / (size / _GIB),
        "read_bytes": after["rchar"] - before["rchar"],
        "disk_bytes": after["read_bytes"] - before["read_bytes"],
        "peak_bytes": _peak(),
        "held_before": held,
    }


def lines(record: dict[str, Any]) -> list[str]:
    """The record as a table."""
    save, whole, alone = record["save"], record["all"], record["parameters"]

    def row(name, size, seconds, found):
        cells = [name, _gib(size), f"{seconds:.1f}", f"{seconds / (size / _GIB):.2f}"]
        read = [_gib(found[key]) if key in found else "" for key in ("read_bytes", "disk_bytes")]
        return [*cells, *read, _gib(found["peak_bytes"])]

    head = ["", "GiB", "s", "s a GiB", "GiB read", "not cached", "GiB held at most"]
    rows = [
        row("save", save["state_bytes"], save["write"], {"peak_bytes": save["peak_bytes"]}),
        row("restore all", whole["state_bytes"], whole["seconds"], whole),
        row("restore parameters", alone["state_bytes"], alone["seconds"], alone),
    ]
    return [
        f"{record['shape']}, {record['layers']} layers, {save['device']}, {save['cores']} cores",
        f"a checkpoint: {_gib(save['state_bytes'])} GiB of arrays, {_gib(save['disk_bytes'])} GiB "
        f"on the disk; without the moments {_gib(save['disk_bytes_without_moments'])}",
        f"a save holds up the step for {save['blocked']:.2f} s (the call {save['call']:.2f} s, a "
        f"step of {save['step']:.2f} s then took {save['step_after_save']:.2f} s); "
        f"a copy of all arrays takes {save['copy']:.2f} s",
        "",
        *command.table(head, rows),
    ]


class _NoData:
    """A source of batches without a position."""

    def get_state(self) -> dict[str, Any]:
        return {}


def _random_state(abstract: Any) -> Any:
    """Normal numbers for every array of floats, zeros for counters."""
    import jax
    import jax.numpy as jnp

    leaves, tree = jax.tree.flatten(abstract)

    def make(key):  # an argument, or XLA would draw the numbers while it compiles
        keys = jax.random.split(key, len(leaves))
        found = [
            jax.random.normal(key, x.shape, x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else jnp.zeros(x.shape, x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, found)

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.block_until_ready(jax.jit(make, out_shardings=shardings)(jax.random.key(0)))


def _open(folder: Path, **options: Any) -> Any:
    from etils import epath

    from lm.runs.checkpoints import Checkpoints

    return Checkpoints(epath.Path(folder) / "checkpoints", command.say, **options)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _forget_pages(folder: Path) -> None:
    """Takes the files out of the page cache, when they are on the disk."""
    for path in _files(folder):
        with _opened(path) as file:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def _io() -> dict[str, int]:
    """Bytes that this process has read: rchar by system calls, read_bytes from the disk."""
    return {k: int(n) for k, n in (line.split(": ") for line in _IO.read_text().splitlines())}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bytes(tree: Any) -> int:
    import jax

    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _gib(count: float) -> str:
    return f"{count / _GIB:.2f}"


if __name__ == "__main__":
    command.run(main)
