"""launch.ablate --stop_early: seeds one by one, and a look at the comparisons after each of them.

What is decided follows from the results of the runs alone, seed by seed in the order of the study,
so that a study that was cut and goes on decides the same. Only the design is written down: with
another number of seeds or comparisons the bounds would be others, and the error rate not kept.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command, records
from lm import strict_json
from lm.errors import InputError
from lm.studies import sequential
from lm.studies.ablation import Ablation, with_needs
from lm.studies.ablation_runs import Run
from lm.studies.outcomes import Row

DESIGN = "stop_early.json"

_MOST_BYTES = 1_000_000


def check(asked: Ablation, folder: Path, wanted: bool) -> None:
    """Checks that a folder has no study of another design.

    Raises:
      InputError: it was started with other seeds or comparisons, or the flag is missing.
    """
    path = folder / DESIGN
    if wanted and len(asked.seeds) < 3:
        raise InputError(f"--stop_early needs at least 3 seeds to look in between: {asked.seeds}")
    if not path.exists():
        return
    if not wanted:
        raise InputError(f"{folder} was started with --stop_early: give it again")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES:,} bytes")
        found = strict_json.loads(path.read_bytes())
        was = {key: found[key] for key in _design(asked)}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no design of --stop_early: {error!r}") from None
    for key, now in _design(asked).items():
        if was[key] != now:
            raise InputError(
                f"{folder} was started with --stop_early and {key}={was[key]}, not {now}: its "
                "bounds hold for that alone; give another --workdir"
            )


def write(asked: Ablation, folder: Path, wanted: bool) -> None:
    """Writes the design of the looks into a folder."""
    if wanted:
        command.write_text(folder / DESIGN, strict_json.dumps(_design(asked), indent=2) + "\n")


def _design(asked: Ablation) -> dict[str, Any]:
    return {
        "seeds": list(asked.seeds),
        "confidence": asked.confidence,
        "baseline": asked.baseline,
        "compared": _compared(asked),
    }


def _compared(asked: Ablation) -> list[str]:
    return [name for name, v in asked.variants.items() if v.compared and name != asked.baseline]


def run(
    asked: Ablation, runs: Sequence[Run], start: Callable[[Sequence[Run]], list[str] | None]
) -> list[str] | None:
    """Runs seed by seed what is not decided.

    Args:
      asked: the study.
      runs: all its runs.
      start: runs some of them, those that have ended not again; the names of what has failed, None
        after a signal.

    Returns:
      As `start`.
    """
    failed: list[str] = []
    told: set[str] = set()
    for number, seed in enumerate(asked.seeds):
        stopped = stops(mark(asked, records.rows(asked, runs, "")))
        for name in [name for name in stopped if name not in told]:
            command.say(f"{name}: stopped after {stopped[name]} of {len(asked.seeds)} seeds")
        told |= stopped.keys()
        going = [name for name in _compared(asked) if stopped.get(name, number + 1) > number]
        if not going:
            break
        names = {n for one in (asked.baseline, *going) for n in with_needs(asked.variants, one)}
        lost = start([r for r in runs if r.seed == seed and r.planned.variant.name in names])
        if lost is None:
            return None
        failed += lost
    return failed


def mark(asked: Ablation, rows: Sequence[Row]) -> list[Row]:
    """The rows with the design and the stops; without those of seeds after a stop.

    A variant is looked at over its leading seeds that have a result, its own and the baseline's: a
    run that failed leaves the looks after it to the time when it has one.
    """
    scores = {(row.variant, row.seed): row.bits_per_byte for row in rows}
    compared, stopped = _compared(asked), {}
    for name in compared:
        differences = []
        for seed in asked.seeds:
            pair = scores.get((name, seed)), scores.get((asked.baseline, seed))
            if None in pair or not abs(pair[0] - pair[1]) < float("inf"):
                break
            differences.append(pair[0] - pair[1])
        at = sequential.stopped_at(differences, len(asked.seeds), len(compared), asked.confidence)
        stopped[name] = at or 0
    return [
        row._replace(planned_seeds=len(asked.seeds), stopped=stopped.get(row.variant, 0))
        for row in rows
        if not (at := stopped.get(row.variant)) or row.seed in asked.seeds[:at]
    ]


def stops(rows: Sequence[Row]) -> dict[str, int]:
    """Variant -> number of seeds after which its comparison was stopped."""
    return {row.variant: row.stopped for row in rows if row.stopped}


def planned(asked: Ablation, runs: Sequence[Run], stopped: Mapping[str, int]) -> list[Run]:
    """The runs without those of seeds that come after the stop of their variant."""
    return [
        one
        for one in runs
        if one.seed in asked.seeds[: stopped.get(one.planned.variant.name, len(asked.seeds))]
    ]
