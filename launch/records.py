"""The files of an ablation's runs: their records, results.csv, costs and progress."""

import csv
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command, processes
from lm import strict_json
from lm.errors import InputError
from lm.flat import leaves
from lm.studies import ablation, ablation_runs, outcomes
from lm.studies.ablation import Ablation, Planned
from lm.studies.ablation_runs import Run
from lm.studies.outcomes import Progress, Row

RECORD = "run.json"

_CONFIG = '''"""{name}, written by launch.ablate."""

import pathlib

from ml_collections import ConfigDict

from lm import strict_json


def get_config() -> ConfigDict:
    """The config in {record}."""
    record = strict_json.loads(pathlib.Path(__file__).with_name("{record}").read_text())
    return ConfigDict(record["config"])
'''


def check(runs: Sequence[Run]) -> None:
    """Checks that every run can start or resume in its folder.

    Raises:
      InputError: a folder holds a run of another config, a run that is being trained, or a run
        without the checkpoint that another variant starts from.
    """
    for run in runs:
        if processes.is_locked(run.folder):
            raise InputError(f"{run.folder}: a run is being trained there; --status shows how far")
        path = run.folder / RECORD
        if not path.exists():
            continue
        old, new = strict_json.loads(path.read_text()), run.record()
        if old["digest"] != new["digest"]:
            raise InputError(
                f"{run.folder} holds a run with {_difference(old, new)}: delete the folder, or "
                "give another --workdir"
            )
        saved, asked = (r["config"]["checkpoint"]["at_steps"] for r in (old, new))
        if missing := sorted(set(asked) - set(saved)):
            raise InputError(
                f"{run.folder} has no checkpoint of step {missing[0]}, from which a variant would "
                "begin: delete the folder, and it will have one"
            )


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    was, now = (dict(leaves({**r["config"], **r.get("quantize", {})})) for r in (old, new))
    for key in [*now, *was]:
        if was.get(key) != now.get(key) and not key.startswith("checkpoint."):
            return f"{key}={was.get(key)}, not {now.get(key)}"
    return "another config"


def write(runs: Iterable[Run], name: str) -> None:
    """Makes the folders of the runs; each gets its record and a config file for launch.train."""
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        record = {**run.record(), "ablation": name}
        command.write_text(run.folder / RECORD, strict_json.dumps(record, indent=2) + "\n")
        command.write_text(run.folder / "config.py", _CONFIG.format(name=run.name, record=RECORD))


def progress(run: Run) -> Progress:
    """Returns how far a run is, from its metrics.jsonl."""
    return outcomes.progress(run.folder, run.planned.steps)


def is_done(run: Run) -> bool:
    """Returns whether a run has ended with a result."""
    return progress(run).result is not None


def rows(asked: Ablation, runs: Sequence[Run], name: str) -> list[Row]:
    """Returns a row for each compared run that has ended, in the order of variants and seeds."""
    found = [
        outcomes.row(asked, name, run, progress(run))
        for run in runs
        if run.planned.variant.compared and is_done(run)
    ]
    order = list(asked.variants)
    return sorted(found, key=lambda row: (order.index(row.variant), row.seed))


def write_csv(path: Path, found: Sequence[Row]) -> None:
    """Writes results.csv; `read_csv` gives the same floats again."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([repr(x) if isinstance(x, float) else x for x in row] for row in found)
    os.replace(part, path)


def read_csv(path: Path) -> list[Row]:
    """Reads the rows of a results.csv.

    Raises:
      InputError: there is no such file, or it is not a results.csv.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    kinds = Row.__annotations__
    try:
        return [
            Row(
                **{
                    name: kinds[name](line[name])
                    for name in Row._fields
                    # Files of older commits lack the fields that have a default.
                    if name in line or name not in Row._field_defaults
                }
            )
            for line in lines
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no results.csv of launch.ablate: {error!r}") from None


def known_rates(planned: Mapping[str, Planned], asked: Ablation, folder: Path) -> dict[str, float]:
    """Returns variant -> median tokens per second of its runs, for variants that have runs."""
    found = {}
    for name in planned:
        places = [folder / name / f"seed_{seed}" for seed in asked.seeds]
        places.append(folder / ablation.RATES / name / f"seed_{asked.seeds[0]}")
        speeds = [outcomes.progress(place, 0).tokens_per_second for place in places]
        if measured := [speed for speed in speeds if speed]:
            found[name] = statistics.median(measured)
    return found


def costs(planned: Mapping[str, Planned], asked: Ablation, rates: Mapping[str, float]) -> list[str]:
    """Returns a table, as lines, of the tokens, FLOPs, bytes and time of each variant."""
    seconds = ablation_runs.estimate_seconds(planned, rates)
    head = ["variant", "parameters", "steps", "tokens", "model FLOPs", "weights", "time of a run"]
    table = [
        [
            name + " *" * (name == asked.baseline) + " (not compared)" * (not one.variant.compared),
            f"{one.parameters:,}",
            f"{one.steps:,}",
            f"{one.tokens:,}",
            f"{one.flops:.3e}",
            f"{one.weight_bytes:,}",
            "after training" if one.variant.quantizes else duration(seconds[name]),
        ]
        for name, one in planned.items()
    ]
    trained = [one for one in planned.values() if not one.variant.quantizes]
    count = len(asked.seeds)
    times = [seconds[one.variant.name] for one in trained]
    total = None if None in times else count * sum(times)
    whole = (
        f"{count * len(trained)} trainings of {len(trained)} variants and {count} "
        f"seed{'s' * (count > 1)}: {count * sum(one.tokens for one in trained):,} tokens, "
        f"{count * sum(one.flops for one in trained):.3e} FLOPs, {duration(total)}"
    )
    return [*command.table(head, table), whole, f"* the baseline; matched: {asked.match}"]


def status(asked: Ablation, folder: Path) -> list[str]:
    """Returns a table, as lines, of how far every run is; reads only files."""
    table = []
    for seed in asked.seeds:
        for name in asked.variants:
            place = folder / name / f"seed_{seed}"
            table.append([f"{name}/seed_{seed}", *_status(place)])
    states = [row[1] for row in table]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    return [*command.table(["run", "", "step", "loss", "tokens/s", "left", ""], table), counts]


def _status(place: Path) -> list[str]:
    path = place / RECORD
    if not path.exists():
        return ["waiting", "", "", "", "", ""]
    record = strict_json.loads(path.read_text())
    steps = record["config"]["train"]["steps"]
    found = outcomes.progress(place, steps)
    state = processes.state(place, found.result is not None)
    loss = found.result["loss"] if found.result else found.train_loss
    left, speed = "", found.tokens_per_second
    if speed and state == "running":
        c = record["config"]
        tokens = (steps - found.step) * c["train"]["batch_size"] * c["data"]["sequence_length"]
        left = duration(tokens / speed)
    return [
        state,
        f"{found.step:,}/{steps:,}",
        "" if loss is None else f"{loss:.4f}",
        "" if speed is None else f"{speed:,.0f}",
        left,
        processes.last_line(place)[:80] if state == "failed" else "",
    ]


def duration(seconds: float | None) -> str:
    """Returns seconds in words; None and NaN give "time not known yet"."""
    if seconds is None or math.isnan(seconds):
        return "time not known yet"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
