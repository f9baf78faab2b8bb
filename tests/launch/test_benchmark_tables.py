"""The tables of benchmarks are made from the metrics of runs, and traced to them."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from launch import benchmark_tables, result_tables, results
from launch.benchmark_tables import interval
from launch.result_tables import Printed
from lm.errors import InputError

ROOT = Path(__file__).parent.parent.parent
SOLVED = {
    "sums": (0.422, 0.234, 0.314),
    600: (0.806, 0.552, 0.794),
    1200: (0.9, 0.822, 0.918),
    1800: (0.966, 0.948, 0.976),
}


def validation(step, **values):
    return {"step": step, "kind": "validation", **values}


def train(step, solved, seconds=2.0, rate=500.0):
    drawing = {"sampling_seconds": seconds, "sampled_tokens_per_second": rate}
    return {"step": step, "kind": "train", "solved": solved, **drawing}


@pytest.fixture
def grpo():
    """Runs with the shares of docs/results/policy_grpo.printed.csv."""
    runs = {("sums", seed): [validation(110, solved=SOLVED["sums"][seed])] for seed in range(3)}
    for seed in range(3):
        lines = [validation(step, solved=SOLVED[step][seed]) for step in (600, 1200, 1800)]
        # Other evaluations and training lines are between them.
        runs["grpo", seed] = [validation(100, solved=0.5), train(100, 0.1), *lines]
    return runs


def test_an_interval_is_that_of_student():
    values = [1.0, 2.5, 4.0]
    half = stats.t.ppf(0.975, 2) * stats.sem(values)
    assert interval(values) == f"2.5000 ± {half:.4f}"
    assert interval(values, "+.2f") == f"+2.50 ± {half:.2f}"
    assert interval([0.5, 0.5]) == "0.5000 ± 0.0000"
    assert interval([0.5]) == "0.5000"


def test_the_table_of_grpo_is_the_one_of_the_page(grpo):
    head, *rows = benchmark_tables.policy_grpo(grpo)
    table = result_tables.read_printed(ROOT / "docs/results/policy_grpo.printed.csv")
    assert (head, rows) == (list(table.head), [list(row) for row in table.rows])


def test_methods_are_compared_seed_by_seed():
    before, ours, theirs = np.array([[0.3, 0.2, 0.4], [0.5, 0.3, 0.7], [0.6, 0.5, 0.7]])
    runs = {("sums", seed): [validation(1, solved=before[seed])] for seed in range(3)}
    for name, solved in (("grpo", ours), ("dapo", theirs)):
        for seed in range(3):
            lines = [train(5, 0.1, 30.0), train(10, solved[seed] / 2, 70.0)]
            lines.append({"step": 11, "kind": "train", "solved": 0.25})
            runs[name, seed] = [*lines, validation(11, solved=solved[seed])]
    head, first, *rows = benchmark_tables.policy_methods(runs)
    assert head == ["method", "solved", "gained", "to grpo", "solved, drawn", "drawn tokens"]
    assert first == ["before", interval(before, ".3f"), "", "", "", ""]
    right, tokens = "0.250 ± 0.000", "50"
    for row, name, solved in zip(rows, ("grpo", "dapo"), (ours, theirs), strict=True):
        against = "" if name == "grpo" else interval(theirs - ours, "+.3f")
        gained = interval(solved - before, "+.3f")
        assert row == [name, interval(solved, ".3f"), gained, against, right, tokens]


def test_preferences_are_read_from_the_last_validation():
    metrics = ("accuracy", "margin", "log_probability_chosen", "log_probability_rejected")
    found = np.random.default_rng(0).uniform(size=(3, 5))
    runs = {
        ("dpo", seed): [
            validation(0, **dict.fromkeys(metrics, 0.0)),
            validation(100, **dict(zip(metrics, values, strict=False))),
            {"step": 100, "kind": "measured", "reference_kl": values[4]},
        ]
        for seed, values in enumerate(found)
    }
    head, row = benchmark_tables.preference(runs)
    table = result_tables.read_printed(ROOT / "docs/results/preference.printed.csv")
    assert head == list(table.head)
    columns = [interval(column) for column in found.T]
    assert row == ["dpo", columns[0], interval(found[:, 0] - 0.5, "+.4f"), *columns[1:]]


def tuned():
    """Runs of two methods with five seeds, and their measures [seeds, method, measure]."""
    found = np.random.default_rng(0).uniform(size=(5, 3, 3))
    runs = {
        (name, seed): [
            validation(3, loss=0.0),
            {"step": 3, "kind": "measured", **dict(zip(KEYS, found[seed, i], strict=True))},
        ]
        for seed in range(5)
        for i, name in enumerate(("before", "cross_entropy", "dft"))
    }
    return runs, found


KEYS = ("answers", "right", "general")


def test_fine_tuning_is_compared_with_the_first_method_and_with_before():
    runs, found = tuned()
    _, before, ours, theirs = benchmark_tables.finetuning(runs)
    cells = [[interval(found[:, i, j]) for j in range(3)] for i in range(3)]
    lost = [interval(found[:, i, 2] - found[:, 0, 2], "+.4f") for i in range(3)]
    better, more, less = (
        interval(sign * (found[:, 2, j] - found[:, 1, j]), "+.4f")
        for j, sign in enumerate((-1, 1, -1))
    )
    answers, right, general = cells[0]
    assert before == ["before", answers, "", right, "", general, "", "", "5"]
    answers, right, general = cells[1]
    assert ours == ["cross_entropy", answers, "", right, "", general, lost[1], "", "5"]
    answers, right, general = cells[2]
    assert theirs == ["dft", answers, better, right, more, general, lost[2], less, "5"]


def test_intervals_are_widened_for_the_seeds_that_a_table_names(tmp_path):
    head, *rows = benchmark_tables.finetuning(tuned()[0])
    for name in ("glow", "rho1"):
        rows.append([name, *rows[-1][1:]])
    wider = stats.t.ppf(1 - 0.025 / 3, 4) / stats.t.ppf(0.975, 4)
    (effect, *others) = Printed(tmp_path / "a", head, rows).effects("better by")
    half = float(rows[-1][2].split("±")[1])
    assert effect.high - effect.difference == pytest.approx(wider * half)
    assert len(others) == 2
    # Without the column it is a table of three seeds.
    wider = stats.t.ppf(1 - 0.025 / 3, 2) / stats.t.ppf(0.975, 2)
    (effect, *_) = Printed(tmp_path / "a", head[:-1], [row[:-1] for row in rows]).effects(
        "better by"
    )
    assert effect.high - effect.difference == pytest.approx(wider * half)


def test_a_collected_table_is_traced_to_its_runs(grpo, tmp_path):
    path = benchmark_tables.collect("policy_grpo", grpo, tmp_path)
    assert path.read_text() == (ROOT / "docs/results" / path.name).read_text()
    table = result_tables.read_printed(path)
    assert results.trace_printed(table) == []
    path.write_text(path.read_text().replace("0.948", "0.949"))
    (line,) = results.trace_printed(result_tables.read_printed(path))
    assert "the runs give 1, 0.234, 0.552, 0.822, 0.948, +0.714, not 1, 0.234" in line
    path.write_text(path.read_text() + "3,0,0,0,0,0\n")
    (line,) = results.trace_printed(result_tables.read_printed(path))
    assert line.endswith(f"6 rows, not the 5 of {table.runs}")


def test_a_table_without_runs_or_of_another_name_is_refused(grpo, tmp_path):
    path = benchmark_tables.collect("policy_grpo", grpo, tmp_path)
    table = result_tables.read_printed(path)
    other = table._replace(path=path.rename(tmp_path / "other.printed.csv"))
    with pytest.raises(InputError, match="there are no runs to compare it with"):
        results.trace_printed(other)
    table.runs.rename(other.runs)
    with pytest.raises(InputError, match=f"valid: {', '.join(benchmark_tables.TABLES)}"):
        results.trace_printed(other)
    with pytest.raises(InputError, match=r"nothing\.printed\.csv: no such file"):
        result_tables.read_printed(tmp_path / "nothing.printed.csv")
