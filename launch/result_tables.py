"""The tables behind the pages of results: studies with their runs, and tables as printed.

A study is a results.csv of launch.ablate, STUDY.csv, with the metrics of its runs beside it in
STUDY.jsonl.gz. A printed table, NAME.printed.csv, is what a program of benchmarks/ has printed, see
launch.benchmark_tables; where the runs have been kept, their metrics are in NAME.jsonl.gz. Its
first column names the rows; a cell is a number, or a mean and half the width of its 95% interval,
as "0.099 ± 0.059".
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch import document, records, report
from launch.benchmark_tables import PRINTED
from launch.document import Paragraph, Table
from launch.forest_plot import Effect, effect
from lm.errors import InputError
from lm.studies import comparison, laws, outcomes, power, raw_runs
from lm.studies.outcomes import Outcome, Row


class Study(NamedTuple):
    """A study of launch.ablate.

    Attributes:
      path: of its results.csv.
      rows: of it.
      outcomes: of its variants.
    """

    path: Path
    rows: Sequence[Row]
    outcomes: Sequence[Outcome]

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return self.rows[0].baseline

    def effects(self) -> list[Effect]:
        """The compared variants."""
        found = [one for one in self.outcomes if one.comparison and one.comparison.seeds]
        return [effect(one) for one in found]

    def markdown(self) -> str:
        """What was trained, and the table."""
        first, seeds = self.rows[0], sorted({row.seed for row in self.rows})
        told = (
            f"Seeds {', '.join(map(str, seeds))}; {first.parameters:,} parameters and "
            f"{first.tokens:,} tokens in {first.variant}; matched: {first.match}. ± is one "
            "standard error over seeds; the intervals hold for all "
            f"{len(self.effects())} comparisons at once."
        )
        return document.markdown([Paragraph(told), report.table(self.outcomes)]).strip()

    def command(self) -> str:
        """Runs it again."""
        seeds = tuple(dict.fromkeys(row.seed for row in self.rows))
        words = [f"--config={self.rows[0].ablation}", f"--config.seeds='{seeds}'"]
        return " ".join(
            ["python -m launch.ablate", *words, f"--workdir=runs/ablations/{self.path.stem}"]
        )

    def scores(self, variant: str) -> dict[int, float]:
        """Seed -> bits per byte.

        Raises:
          InputError: there is no such variant.
        """
        found = {row.seed: row.bits_per_byte for row in self.rows if row.variant == variant}
        if not found:
            valid = ", ".join(one.variant for one in self.outcomes)
            raise InputError(f"{self.path} has no variant {variant!r}; valid: {valid}")
        return found

    def fits(self) -> dict[str, laws.Fit]:
        """The scaling laws by their names, fitted to all runs but those of the most FLOPs.

        Raises:
          InputError: the runs do not determine a law.
        """
        runs, held = laws.columns(self.rows), laws.most_flops(self.rows)
        try:
            found = [laws.fit(law, *runs, held_out=held) for law in laws.LAWS]
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from None
        return {one.law.name.partition(":")[0]: one for one in found}

    def law_table(self) -> str:
        """The fitted laws, their coefficients and mean relative errors."""
        head = ["law", "coefficients", "error on fitted runs", "on held-out runs"]
        lines = [
            [
                fit.law.name,
                ", ".join(f"{name} {value:.4g}" for name, value in fit.coefficients.items()),
                f"{fit.error:.2%}",
                f"{fit.held_out_error:.2%}",
            ]
            for fit in self.fits().values()
        ]
        return document.markdown([Table(head, lines)]).strip()


class Printed(NamedTuple):
    """A table that a program has printed.

    Attributes:
      path: of the file.
      head: names of the columns.
      rows: cells, the first of each row its name.
    """

    path: Path
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def runs(self) -> Path:
        """The metrics of its runs, which may not have been kept."""
        return self.path.with_name(self.path.name.removesuffix(PRINTED) + raw_runs.SUFFIX)

    def markdown(self) -> str:
        """The table."""
        return document.markdown([Table(self.head, self.rows)]).strip()

    def cell(self, row: str, column: str) -> str:
        """The cell, as it was printed.

        Raises:
          InputError: there is no such row or column.
        """
        for name, valid in ((row, [one[0] for one in self.rows]), (column, self.head[1:])):
            if name not in valid:
                raise InputError(f"{self.path} has no {name!r}; valid: {', '.join(valid)}")
        (found,) = (one for one in self.rows if one[0] == row)
        return found[self.head.index(column)]

    def effects(self, column: str) -> list[Effect]:
        """The rows with an interval in a column of gains: above 0 is better.

        The intervals are those of the seeds in the column "seeds", of three without it.

        Raises:
          InputError: there is no such column, or none with an interval in it.
        """
        cells = {one[0]: self.cell(one[0], column) for one in self.rows}
        found = {name: cell for name, cell in cells.items() if "±" in cell}
        if not found:
            raise InputError(f"{self.path}: there is no interval in {column!r}")
        try:
            seeds = int(self.cell(next(iter(found)), "seeds")) if "seeds" in self.head else SEEDS
            wider = power.critical(seeds, len(found)) / power.critical(seeds, 1)
            return [_printed_effect(name, cell, wider) for name, cell in found.items()]
        except ValueError as error:
            raise InputError(f"{self.path}: column {column!r}: {error}") from None


SEEDS = 3  # of a printed table without a column of them

Tables = dict[str, Study | Printed]


def load(folder: Path) -> Tables:
    """All tables of a folder by their names.

    Raises:
      InputError: one of them cannot be read.
    """
    found: Tables = {}
    for path in sorted(folder.glob("*.csv")):
        if path.name.endswith(PRINTED):
            found[path.name.removesuffix(PRINTED)] = read_printed(path)
        else:
            found[path.stem] = _read_study(path)
    return found


def _read_study(path: Path) -> Study:
    rows = records.read_csv(path)
    if not rows:
        raise InputError(f"{path}: there is no run in it")
    return Study(path, rows, outcomes.outcomes(rows))


def read_printed(path: Path) -> Printed:
    """The printed table of a file.

    Raises:
      InputError: there is no such file, or it is not a table.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    if len(lines) < 2 or len({len(line) for line in lines}) != 1:
        raise InputError(f"{path}: not a table: rows of one length below a head")
    return Printed(path, lines[0], lines[1:])


def _printed_effect(name: str, cell: str, wider: float) -> Effect:
    mean, half = (float(text) for text in cell.split("±"))
    digits = len(re.match(r"[^.±]*\.?(\d*)", cell)[1])
    low, high = mean - wider * half, mean + wider * half
    verdict = "better" if low > 0 else "worse" if high < 0 else "not resolved"
    return Effect(name, mean, low, high, mean - half, mean + half, verdict, digits, "")


def differences(study: Study, variant: str, other: str) -> dict[int, float]:
    """Seed -> bits per byte of a variant minus those of another."""
    ours, theirs = study.scores(variant), study.scores(other)
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def deviation(study: Study, variant: str) -> float:
    """The standard deviation of a variant's bits per byte over seeds."""
    found = comparison.summarise([*study.scores(variant).values()])
    return found.standard_error * found.seeds**0.5
