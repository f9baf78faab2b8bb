"""What launch.ablate --power says: the power of a study's comparisons before it is started."""

import math
from collections.abc import Mapping
from pathlib import Path

from launch import command, records
from launch.document import Table
from lm import strict_json
from lm.errors import InputError
from lm.studies import comparison, outcomes, power
from lm.studies.ablation import Ablation

_MOST_RECORD = 10_000_000  # bytes of a run.json
_TARGET = 0.8


def lines(
    asked: Ablation, folder: Path | None, difference: float | None, deviation: float | None
) -> list[str]:
    """The seeds that each comparison needs, and what the configured seeds can do, as a table.

    Args:
      asked: the study.
      folder: its work directory with finished runs, the pilot; not read with a `deviation`.
      difference: to be resolved, bits per byte; without one, the smallest that can be is shown.
      deviation: of the paired differences, bits per byte.

    Raises:
      InputError: a number that is none of these, or a folder without a pilot.
    """
    for name, value in (("difference", difference), ("deviation", deviation)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"--{name}={value} must be a positive number of bits per byte")
    compared = [name for name, v in asked.variants.items() if v.compared and name != asked.baseline]
    if not compared:
        raise InputError("the study compares nothing: it has no variant besides the baseline")
    if deviation is not None:
        found = dict.fromkeys(compared, power.Deviation(deviation, deviation, 0))
    elif folder is not None:
        found = pilot(asked, folder)
    else:
        raise InputError(
            "--power needs --deviation=BITS_PER_BYTE, or --workdir=FOLDER with finished runs"
        )
    table = _table(asked, compared, found, difference)
    return [
        *command.table(table.head, table.rows),
        *_explained(asked, compared, deviation is None, difference),
    ]


def pilot(asked: Ablation, folder: Path) -> dict[str, power.Deviation]:
    """Variant -> standard deviation of its paired differences over the finished runs of a folder.

    Every seed counts that has a result of the variant and of the baseline, also one that the study
    does not plan. Variants with fewer than two such seeds are left out.

    Raises:
      InputError: no variant has two.
    """
    scores = {
        name: _scores(folder / name) for name, variant in asked.variants.items() if variant.compared
    }
    found = {}
    for name, losses in scores.items():
        paired = comparison.paired(scores[asked.baseline], losses)
        if name != asked.baseline and len(paired) > 1:
            s = float(paired.std(ddof=1))
            found[name] = power.Deviation(s, power.deviation_limit(s, len(paired)), len(paired))
    if not found:
        raise InputError(
            f"--workdir={folder} has no variant of which two seeds have ended, and of "
            f"{asked.baseline}, too; give --deviation=BITS_PER_BYTE instead"
        )
    return found


def _scores(place: Path) -> Mapping[int, float]:
    """Seed -> bits per byte of the runs of a variant that have ended."""
    scores = {}
    for record in sorted(place.glob(f"seed_*/{records.RECORD}")):
        try:
            if record.stat().st_size > _MOST_RECORD:
                raise ValueError(f"larger than {_MOST_RECORD:,} bytes")
            content = strict_json.loads(record.read_bytes())
            seed, steps = int(content["seed"]), int(content["config"]["train"]["steps"])
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{record}: no record of a run: {error!r}") from None
        if result := outcomes.progress(record.parent, steps).result:
            scores[seed] = result["bits_per_byte"]
    return scores


def _table(
    asked: Ablation,
    compared: list[str],
    found: Mapping[str, power.Deviation],
    difference: float | None,
) -> Table:
    count, seeds, confidence = len(compared), len(asked.seeds), asked.confidence
    piloted = any(s.seeds for s in found.values())
    head = ["comparison", "deviation", *["pilot seeds", "upper limit"] * piloted]
    head.append(f"resolved by {seeds} seeds")
    if difference is not None:
        head += [f"power of {seeds} seeds", "seeds needed", *["for the upper limit"] * piloted]
    rows = []
    for name in compared:
        if name not in found:
            rows.append([name, *["unknown"] * (len(head) - 1)])
            continue
        s = found[name]
        least = power.smallest_difference(s.value, seeds, count, confidence, _TARGET)
        row = [name, f"{s.value:.4f}", *[str(s.seeds), f"{s.upper:.4f}"] * piloted]
        row.append(f"{least:.4f}" if math.isfinite(least) else "nothing")
        if difference is not None:
            has = _power(difference, s.value, seeds, count, confidence)
            needed = [_needed(difference, x, count, confidence) for x in (s.value, s.upper)]
            row += [f"{has:.2f}", *needed[: 1 + piloted]]
        rows.append(row)
    return Table(head, rows)


def _power(difference: float, deviation: float, seeds: int, count: int, confidence: float) -> float:
    if not deviation:  # runs that do not differ: any difference is resolved, by two of them
        return float(seeds > 1)
    return power.power(difference, deviation, seeds, count, confidence)


def _needed(difference: float, deviation: float, count: int, confidence: float) -> str:
    seeds = power.seeds_to_resolve(difference, deviation, count, confidence, _TARGET)
    return "more than 100,000" if seeds is None else f"{seeds:,}"


def _explained(
    asked: Ablation, compared: list[str], piloted: bool, difference: float | None
) -> list[str]:
    count, level = len(compared), 1 - (1 - asked.confidence) / len(compared)
    needed = "" if difference is None else f"; seeds needed: for a difference of {difference:g}"
    limit = (
        " Upper limit: the true deviation is below it with a probability of 80%; with a pilot of "
        "few seeds, plan with it."
    )
    return [
        f"bits per byte; paired differences to {asked.baseline}, intervals at {level:.2%} "
        f"({count} comparison{'s' * (count > 1)})",
        f"Resolved: with a power of {_TARGET:.0%}{needed}.{limit * piloted}",
    ]
