"""What fits where: the table of docs/scale.md, from the configs of configs/scale.

python -m launch.scale --output=docs/scale.md

Every row for TPUs is the train step compiled ahead of time, minutes each; it needs the extra tpu.
What was found is kept beside the table, in docs/scale.json: rows whose config or packages have not
changed since are not compiled again, so that the command can be cut and goes on where it was. Rows
for GPUs, for which nothing is compiled, count bytes by formula.
"""

import hashlib
import importlib.metadata
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from launch import command
from launch.plan import prepare_for_tpu
from lm import strict_json
from lm.errors import InputError

FOLDER = Path(__file__).parent.parent / "configs" / "scale"
HEAD = ["size", "on", "mesh", "micro-batches", "a chip", "of it", "fits", "MFU", "CPU to compile"]

# 80 GB of HBM3 (the maker's data sheet of the SXM5 board), and how many of them.
_H100_MEMORY, _H100_COUNT = 80e9, 8


class Row(NamedTuple):
    """A size on some hardware: the file, the argument of its config, and a topology or ""."""

    size: str
    hardware: str
    topology: str

    @property
    def config(self) -> Any:
        """The config of this row."""
        return command.load_config(FOLDER / f"{self.size}.py", self.hardware)


def rows() -> list[Row]:
    """All rows, the smallest size first: 1b3 is 1.3 billion."""

    def order(path: Path) -> float:
        whole, unit, tenths = re.fullmatch(r"(\d+)([mb])(\d*)", path.stem).groups()
        return float(f"{whole}.{tenths}") * {"m": 1e6, "b": 1e9}[unit]

    found = []
    for path in sorted((p for p in FOLDER.glob("*.py") if p.stem != "__init__"), key=order):
        topologies = runpy.run_path(str(path))["TOPOLOGIES"]
        found += [Row(path.stem, hardware, name) for hardware, name in topologies.items()]
    return found


def main() -> None:
    """Fills the table."""
    if not command.OUTPUT.value:
        raise InputError("--output=FILE.md is missing, for example --output=docs/scale.md")
    output = Path(command.OUTPUT.value)
    prepare_for_tpu()
    from lm.planning import ahead

    ahead.require_libtpu()
    known = load(output.with_suffix(".json"))
    for row in pending(known):
        command.say(f"{row.size} on {row.topology or row.hardware}")
        known[name(row)] = examine(row)
        command.write_text(output.with_suffix(".json"), strict_json.dumps(known, indent=1) + "\n")
        command.write_text(output, page(known))
    command.write_text(output, page(known))


def load(path: Path) -> dict[str, Any]:
    """What earlier commands have found, by `name`."""
    return strict_json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def name(row: Row) -> str:
    """Of a row, in the file."""
    return f"{row.size} {row.hardware}"


def pending(known: dict[str, Any]) -> Iterator[Row]:
    """Rows of which nothing is known, or of another config or other packages.

    Those of the formula first, then one of each size, the smallest first.
    """
    missing = [row for row in rows() if known.get(name(row), {}).get("of") != identity(row)]
    hardware = list(dict.fromkeys(row.hardware for row in missing))
    missing.sort(key=lambda row: (row.topology != "", hardware.index(row.hardware)))
    yield from missing


def identity(row: Row) -> dict[str, str]:
    """What a row depends on: its config, and who compiles it."""
    text = strict_json.dumps(row.config.to_dict(), sort_keys=True)
    packages = ("jax", "libtpu") if row.topology else ("jax",)
    versions = {package: importlib.metadata.version(package) for package in packages}
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"config": digest, "topology": row.topology, **versions}


def examine(row: Row) -> dict[str, Any]:
    """Compiles a row, or counts its bytes: what is kept of it."""
    from lm.planning import ahead, layout_search, plan
    from lm.training import experiment

    config = row.config
    vocab_size = plan.vocabulary(config.data)
    topology = ahead.load_topology(row.topology) if row.topology else None
    run = experiment.build(config, vocab_size, topology.devices if topology else _H100_COUNT)
    record = {
        "of": identity(row),
        "parameters": plan.make_plan(run).parameters.total,
        "mesh": dict(run.mesh.shape),
        "accumulation": config.train.accumulation,
        "tokens": config.train.batch_size * config.data.sequence_length,
        "memory": topology.memory if topology else _H100_MEMORY,
    }
    if not topology:
        return record | {"bytes": layout_search.least_bytes(run, config.train.accumulation)}
    compiled = plan.as_dict(ahead.compile_step(run, topology))
    return record | {"bytes": None, "compiled": compiled, "cpu_seconds": compiled["cpu_seconds"]}


def page(known: dict[str, Any]) -> str:
    """docs/scale.md, of all rows and what is known of them."""
    cells = [_cells(row, known.get(name(row))) for row in rows()]
    lines = [_line(HEAD), _line(["---"] + ["---:"] * (len(HEAD) - 1)), *map(_line, cells)]
    compiled = [known[name(row)] for row in rows() if "compiled" in known.get(name(row), {})]
    seconds = sum(one["cpu_seconds"] for one in compiled)
    versions = sorted(
        {" and ".join(f"{p} {one['of'][p]}" for p in ("jax", "libtpu")) for one in compiled}
    )
    total = f"{len(compiled)} rows in {seconds / 60:.0f} minutes of one core's time with "
    return _TEXT.format(table="\n".join(lines), total=total + ", ".join(versions))


_TEXT = """# What fits where

The sizes of [configs/scale](../configs/scale), each on slices of TPU v5e and v5p and on 8 H100s.
Nothing here has run: no accelerator was there. This page is written by

```bash
python -m launch.scale --output=docs/scale.md
```

{table}

On TPUs the train step itself was compiled for the slice ({total}),
and the bytes are those that XLA has assigned to a chip. The MFU is an estimate that no run has
confirmed: the model's FLOPs at the peak, over XLA's cycles for every instruction and the bytes that
a chip must receive from others, at the bandwidth of all its links (the maker's data sheets). The
lower figure is without any overlap of the two, the higher one with all of it. Attention kernels, of
which XLA has no cycles, count with their FLOPs at the peak; latency and input are in neither
figure. "not examined" is a row that the command has not come to yet.

On H100s nothing was compiled. The bytes are a formula's lower bound: train state, gradients in
float32, and the input of every layer for one micro-batch. What is above the memory cannot fit; what
is below may.

Rows of 32,768 and 131,072 tokens, with the length over chips, are in [long rows](long.md).
"""


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, record: dict[str, Any] | None) -> list[str]:
    place = row.topology or f"{_H100_COUNT} x H100"
    if record is None:
        return [row.size, place, "", "", "", "", "not examined", "", ""]
    mesh = " x ".join(f"{axis} {n}" for axis, n in record["mesh"].items() if n > 1)
    compiled = record.get("compiled")
    memory = compiled and compiled["memory"]
    size = memory["total"] if memory else record["bytes"]
    least = "at least " if compiled is None else ""
    verdict, mfu, seconds = "no", "", ""
    if compiled:
        seconds = f"{record['cpu_seconds']:.0f} s"
        if compiled["fits"]:
            verdict = "yes"
        if e := compiled["estimate"]:
            mfu = f"{e['sequential_mfu']:.0%} to {e['overlapped_mfu']:.0%}"
    elif size <= record["memory"]:
        verdict = "may"
    return [
        row.size,
        place,
        mesh,
        str(record["accumulation"]),
        f"{least}{size / 2**30:.1f} GiB" if size else "more than it has",
        f"{size / record['memory']:.0%}" if size else "",
        verdict,
        mfu,
        seconds,
    ]


if __name__ == "__main__":
    command.run(main)
