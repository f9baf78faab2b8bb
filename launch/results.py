"""Builds the pages of results from the files of docs/results, and traces their numbers to runs.

python -m launch.results [--output=docs/results.md]
python -m launch.results --collect=runs/ablations/codes
python -m launch.results --trace=docs/results.md
python -m launch.results --trace=docs/results/codes.md
python -m launch.results --trace=docs/results/codes.csv [--workdir=runs/ablations/codes]
python -m launch.results --trace=docs/results/codes.jsonl.gz [--variant=binary] [--seed=0]

A question is a file docs/results/questions/NUMBER_NAME.md, see launch.result_pages; of it are made
docs/results/NAME.md, its plot NAME.svg, and its line of docs/results.md. The tables in it are made
from the results.csv of ablations, docs/results/STUDY.csv. The metrics of their runs are in
docs/results/STUDY.jsonl.gz. --collect makes both files from the work directory of an ablation.

--trace of a page prints the numbers that its text quotes with the losses of the seeds behind them,
compares the tables of the page with their runs, and the page and its plot with the tables. --trace
of a table compares its numbers with those of the runs, which are read from the file beside it, or
from a work directory. --trace of that file prints the lines of all runs, of a variant or of a seed,
or writes them to --output.
"""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import benchmark_tables, command, records, result_pages, result_tables
from launch.result_tables import Printed, Study
from lm import strict_json
from lm.errors import InputError
from lm.studies import outcomes, raw_runs
from lm.studies.outcomes import Row
from lm.training.logging import read_metrics

_TRACE = flags.DEFINE_string(
    "trace",
    None,
    "A page of results or a results.csv to compare with its runs, or a STUDY.jsonl.gz to print.",
)
_COLLECT = flags.DEFINE_string("collect", None, "Work directory of an ablation, to copy from.")
_VARIANT = flags.DEFINE_string("variant", None, "Of the runs that --trace=STUDY.jsonl.gz prints.")

_FOLDER = Path("docs/results")


def main() -> None:
    """Writes the pages, adds an ablation to them, or traces a page or a table."""
    traced = Path(_TRACE.value or "")
    if traced.name.endswith(raw_runs.SUFFIX):
        _print_runs(traced)
        return
    if _VARIANT.value is not None or command.SEED.value is not None:
        raise InputError("--variant and --seed need --trace=STUDY.jsonl.gz")
    if traced.suffix in (".md", ".svg"):
        if command.WORKDIR.value:
            raise InputError("--workdir needs --trace of a results.csv")
        trace_page(traced)
        return
    if _TRACE.value:
        _compare(traced)
        return
    if _COLLECT.value:
        print(f"written: {collect(Path(_COLLECT.value), _FOLDER)}")
        return
    output = Path(command.OUTPUT.value or "docs/results.md")
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}")
    files = result_pages.build(_FOLDER)
    (output.parent / _FOLDER.name).mkdir(exist_ok=True)
    for name, text in files.items():
        place = output if name == result_pages.FRONT else output.parent / name
        command.write_text(place, text)
        print(f"written: {place}")


def collect(workdir: Path, folder: Path) -> Path:
    """Copies the results.csv of an ablation, and the metrics of its runs, to a folder.

    Args:
      workdir: the work directory of the ablation; its name is that of the copies.
      folder: of the document.

    Returns:
      The copy of results.csv; the metrics are in the file of `raw_runs` beside it.

    Raises:
      InputError: there is no results.csv, or its numbers are not those of the runs.
    """
    table = workdir / "results.csv"
    rows = records.read_csv(table)
    if wrong := trace(table, workdir):
        raise InputError(wrong[0])
    runs = {(row.variant, row.seed): _read_run(workdir, row) for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    command.write_bytes(folder / f"{workdir.name}{raw_runs.SUFFIX}", raw_runs.encode(runs))
    copy = folder / f"{workdir.name}.csv"
    command.write_bytes(copy, table.read_bytes())
    return copy


def trace(path: Path, source: Path) -> list[str]:
    """Compares the rows of a results.csv with the metrics of their runs.

    Args:
      path: the results.csv.
      source: the work directory of the ablation, or a file of `raw_runs`. In a work directory the
        digest of each run's config is compared, too, where its record is there.

    Returns:
      One line for every number that differs and for every run that has no result.

    Raises:
      InputError: a file cannot be read.
    """
    rows = records.read_csv(path)
    wrong = []
    for row, lines in zip(rows, _runs_of(rows, source), strict=True):
        found = outcomes.progress_of(lines, row.steps)
        if found.result is None:
            wrong.append(f"{row.metrics}: there is no result of step {row.steps}")
            continue
        speed = math.nan if found.tokens_per_second is None else found.tokens_per_second
        pairs = {
            "loss": (row.loss, found.result["loss"]),
            "bits_per_byte": (row.bits_per_byte, found.result["bits_per_byte"]),
            "tokens_per_second": (row.tokens_per_second, speed),
            "steps": (row.steps, found.result["step"]),
        }
        record = source / Path(row.metrics).parent / records.RECORD
        if record.exists():
            digest = strict_json.loads(record.read_text())["digest"]
            pairs["config_hash"] = row.config_hash, digest
        for name, (ours, theirs) in pairs.items():
            if ours != theirs and not (ours != ours and theirs != theirs):  # both NaN
                wrong.append(f"{row.metrics}: {name} is {theirs}, not {ours}")
    return wrong


def _runs_of(rows: Sequence[Row], source: Path) -> list[list[dict[str, Any]]]:
    """The lines of metrics.jsonl of every row's run; [] for a run that is not there."""
    if source.is_dir():
        return [_read_run(source, row) for row in rows]
    runs = raw_runs.read(source)
    return [runs.get((row.variant, row.seed), []) for row in rows]


def _read_run(workdir: Path, row: Row) -> list[dict[str, Any]]:
    return read_metrics((workdir / row.metrics).parent)


def trace_page(path: Path) -> None:
    """Prints where the numbers of a page come from; exits with code 1 if one is not that of a run.

    Raises:
      InputError: it is no page of results.
    """
    files = result_pages.build(_FOLDER)
    valid = {_FOLDER.parent / name: text for name, text in files.items()}
    path = Path(os.path.relpath(path))
    if path not in valid:
        raise InputError(f"--trace={path}: no page of results; valid: {', '.join(map(str, valid))}")
    tables = result_tables.load(_FOLDER)
    found = result_pages.sources(_FOLDER)
    chosen = [one for one in found if one.name == path.stem] or found
    wrong, used = [], {}
    for source in chosen:
        print(source.question)
        for _, quotation in result_pages.quoted(source, tables):
            if quotation.source:
                print(f"  {quotation.text}\n    {quotation.source}")
        used |= {table.path: table for table in result_pages.used(source, tables)}
    for table in used.values():
        wrong += _trace_table(table)
    names = {path, *(_FOLDER / f"{one.name}{end}" for one in chosen for end in (".md", ".svg"))}
    for name in sorted(names):
        if not name.is_file() or name.read_text("utf-8") != valid[name]:
            wrong.append(f"{name}: not that of the tables: run python -m launch.results")
    if wrong:
        print("\n".join(wrong))
        sys.exit(1)
    print(f"{', '.join(map(str, sorted(names)))}: as made from these tables")


def _trace_table(table: Study | Printed) -> list[str]:
    """Compares a table with its runs, and prints what was compared; returns what differs."""
    if isinstance(table, Printed):
        wrong = trace_printed(table) if table.runs.exists() else []
        if not table.runs.exists():
            print(f"{table.path}: as printed; its runs are not kept: compared with nothing")
        elif not wrong:
            print(f"{table.path}: as made from the runs of {table.runs}")
        return wrong
    source = table.path.with_suffix(raw_runs.SUFFIX)
    wrong = trace(table.path, source)
    if not wrong:
        print(_agreement(table.path, len(table.rows), source))
    return wrong


def trace_printed(table: Printed) -> list[str]:
    """Makes a printed table again from the metrics of its runs.

    Returns:
      One line for every row that differs.

    Raises:
      InputError: there are no runs, or no function of launch.benchmark_tables has its name.
    """
    if not table.runs.exists():
        raise InputError(f"{table.path} is as it was printed: there are no runs to compare it with")
    name = table.path.name.removesuffix(result_tables.PRINTED)
    make = benchmark_tables.TABLES.get(name)
    if make is None:
        valid = ", ".join(benchmark_tables.TABLES)
        raise InputError(f"{table.path}: no table of launch.benchmark_tables; valid: {valid}")
    made, ours = make(raw_runs.read(table.runs)), [list(row) for row in (table.head, *table.rows)]
    if len(made) != len(ours):
        return [f"{table.path}: {len(ours)} rows, not the {len(made)} of {table.runs}"]
    return [
        f"{table.path}: the runs give {', '.join(theirs)}, not {', '.join(row)}"
        for row, theirs in zip(ours, made, strict=True)
        if row != theirs
    ]


def _agreement(path: Path, count: int, source: Path) -> str:
    return f"{path}: steps, losses and speeds of all {count} runs are those of {source}"


def _compare(path: Path) -> None:
    """Prints what `trace` finds; exits with code 1 if it finds a difference."""
    if path.name.endswith(result_tables.PRINTED):
        table = result_tables.read_printed(path)
        if wrong := trace_printed(table):
            print("\n".join(wrong))
            sys.exit(1)
        print(f"{path}: as made from the runs of {table.runs}")
        return
    if command.WORKDIR.value:
        source = Path(command.WORKDIR.value)
    elif path.name == "results.csv":  # in the work directory of its ablation
        source = path.parent
    else:
        source = path.with_suffix(raw_runs.SUFFIX)
    wrong = trace(path, source)
    count = len(records.read_csv(path))
    if wrong:
        print("\n".join(wrong))
        print(f"{path}: {len(wrong)} differences between its {count} runs and those of {source}")
        sys.exit(1)
    print(_agreement(path, count, source))


def _print_runs(path: Path) -> None:
    """Prints the lines of the runs that the flags name, or writes them to --output."""
    lines = raw_runs.select(path, _VARIANT.value, command.SEED.value)
    if not command.OUTPUT.value:
        command.show(lines)
        return
    output = Path(command.OUTPUT.value)
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}")
    command.write_text(output, "".join(lines))
    print(f"written: {output}")


if __name__ == "__main__":
    command.run(main)
