"""The pages of results agree with their tables, and the tables with their runs."""

import csv
import gzip
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from launch import quotations, records, result_pages, result_tables, results
from launch.result_tables import Printed, Study
from lm.errors import InputError
from lm.studies import raw_runs

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path("docs/results")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def files():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return result_pages.build(FOLDER)


@pytest.fixture(scope="module")
def tables():
    return result_tables.load(ROOT / FOLDER)


@pytest.fixture(scope="module")
def sources():
    return result_pages.sources(ROOT / FOLDER)


def by_hand(path, variant):
    """Difference, interval and verdict from the lines of a results.csv."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    scores = {}
    for line in lines:
        scores.setdefault(line["variant"], []).append(float(line["bits_per_byte"]))
    found = np.subtract(scores[variant], scores[lines[0]["baseline"]])
    level = 1 - 0.05 / (len(scores) - 1) / 2
    half = stats.t.ppf(level, len(found) - 1) * stats.sem(found)
    low, high = found.mean() - half, found.mean() + half
    verdict = "better" if high < 0 else "worse" if low > 0 else "not resolved"
    return f"{found.mean():+.4f}", f"{low:+.4f} to {high:+.4f}", verdict


def cells(text):
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]


def test_the_committed_pages_and_plots_are_those_of_the_tables(files):
    for name, text in files.items():
        assert (ROOT / "docs" / name).read_text("utf-8") == text, name
    found = [p for end in ("md", "svg") for p in FOLDER.glob(f"*.{end}")]
    assert {f"results/{path.name}" for path in found} == files.keys() - {"results.md"}


def test_the_site_lists_every_page(files):
    listed = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    for name in files:
        assert name.endswith(".svg") or f": {name}\n" in listed


def test_every_number_of_the_tables_is_that_of_its_run():
    found = [one for one in FOLDER.glob("*.csv") if not one.name.endswith(".printed.csv")]
    assert len(found) > 10
    for table in found:
        file = table.with_suffix(".jsonl.gz")
        assert results.trace(table, file) == []
        texts = (raw_runs.encode(raw_runs.read(file)), file.read_bytes())
        assert len(set(map(gzip.decompress, texts))) == 1


def test_verdicts_at_a_glance_agree_with_the_tables(files, tables, sources):
    front = files["results.md"].partition("## Verdicts at a glance")[2].partition("\n## ")[0]
    lines = cells(front)[1:]
    assert len(lines) == len(sources) == 10
    for (question, answer, difference, verdict, counts), source in zip(lines, sources, strict=True):
        assert question == f"[{source.question}](results/{source.name}.md)"
        assert verdict in answer
        page = files[f"results/{source.name}.md"]
        place = next(p for p in quotations.places(source.answer) if "|" in p)
        name, _, row = place.partition("|")[0].partition("/")
        if isinstance(tables[name], Study):
            number, interval, expected = by_hand(FOLDER / f"{name}.csv", row)
            assert difference == f"{number} bits/byte ({interval})"
            assert verdict == expected
            # The same row of the table on the page.
            assert [number, interval, verdict] in [line[4:7] for line in cells(page)]
            compared = [line[6] for line in cells(page) if len(line) > 6]
            shown = [word for word in compared if word not in ("baseline", "verdict")]
            told = {word: shown.count(word) for word in ("better", "worse", "not resolved")}
            assert counts == ", ".join(f"{n} {word}" for word, n in told.items() if n)
        else:
            number = difference.split()[0]
            assert any(cell.startswith(f"{number} ±") for line in cells(page) for cell in line)


def test_other_seeds_fall_into_the_stated_intervals(tables):
    """A study that was run again with other seeds, `NAME_again`, and its differences."""
    again = [name for name in tables if name.endswith("_again")]
    assert again
    for name in again:
        first, second = (tables[one] for one in (name.removesuffix("_again"), name))
        seeds = [{row.seed for row in study.rows} for study in (first, second)]
        assert not seeds[0] & seeds[1]
        for one, other in zip(first.effects(), second.effects(), strict=True):
            assert one.label == other.label
            assert one.low < other.difference < one.high


def test_every_verdict_of_a_page_and_its_plot_is_computed_by_hand(files, tables, sources):
    count = 0
    for source in sources:
        page, plot = (files[f"results/{source.name}.{end}"] for end in ("md", "svg"))
        for table in result_pages.used(source, tables):
            if isinstance(table, Printed):
                continue
            for effect in table.effects():
                number, interval, verdict = by_hand(table.path, effect.label)
                assert [number, interval, verdict] in [line[4:7] for line in cells(page)]
                assert f">{number}  ({interval})<" in plot
                assert effect.verdict == verdict
                count += 1
    assert count > 50


def test_an_answer_stands_at_the_top_of_its_page_with_difference_and_interval(files, sources):
    for source in sources:
        _, question, answer, plot, *_ = files[f"results/{source.name}.md"].split("\n\n")
        assert question == f"# {source.question}"
        assert answer.endswith(".")
        told = " ".join(answer.split())
        assert re.search(r"\([+-]\d\.\d+( bits/byte)?, 95% interval \S+ to \S+\)", told)
        assert plot.endswith(f"]({source.name}.svg)")
        text = files[f"results/{source.name}.md"]
        assert text.index(plot) < text.index("\n| ") < text.index("## How to run it")
        assert text.index("## How to run it") < text.index("## What we read in it")


def test_no_difference_of_an_answer_or_reading_is_typed(sources):
    """What stands there as a decimal number is quoted from a table."""
    for source in sources:
        reading = source.text.partition("## What we read in it")[2]
        assert len(reading) > 100
        typed = re.sub(r"\$\{[^{}]*\}", "", source.answer + reading)
        assert not re.findall(r"\d\.\d", typed), source.path


def test_the_shares_that_a_reading_names_are_those_of_the_runs(files):
    text = " ".join(files["results/qat_fraction.md"].split())
    shares = []
    for steps in (3200, 200):
        for bits in (4, 2):
            rows = records.read_csv(FOLDER / f"qat_fraction_{bits}_{steps}.csv")
            row = next(row for row in rows if row.variant == "optimal")
            shares.append(round(100 * row.quantized_tokens / row.tokens))
    assert "({}% and {}% there, {}% and {}% at the shortest)".format(*shares) in text


def test_the_sizes_that_a_page_names_are_those_of_the_runs(files):
    text = " ".join(files["results/qat_fraction.md"].split())
    found = []
    for steps in (200, 800, 3200):
        row = records.read_csv(FOLDER / f"qat_fraction_4_{steps}.csv")[0]
        assert row.steps == steps
        assert round(row.parameters / 1000) == 41
        found.append(round(row.tokens / row.parameters))
    assert "{}, {} and {} tokens a parameter (200, 800 and 3200 steps)".format(*found) in text
    for name in ("codes", "after_training_2", "weighting_clean"):
        row = records.read_csv(FOLDER / f"{name}.csv")[0]
        page = files[f"results/{name.partition('_2')[0].partition('_clean')[0]}.md"]
        parameters, tokens = row.parameters / 1e6, row.tokens / 1e6
        assert f"{parameters:.1f} million parameters" in page
        assert f"{tokens:.1f} million tokens" in page


def test_what_the_page_of_policy_gradients_repeats_is_in_the_tables(tables):
    text = (ROOT / "docs" / "policy.md").read_text().partition("## Measured")[2]
    repeated = re.findall(r"(\d\.\d+) ± (\d\.\d+)", text.partition("\n## ")[0])
    assert len(repeated) == 3
    cells = {
        tuple(f"{abs(float(x)):.2f}" for x in cell.split(" ± "))
        for name in ("policy_grpo", "policy_methods")
        for row in tables[name].rows
        for cell in row[1:]
        if "±" in cell
    }
    assert set(repeated) <= cells


def test_a_printed_table_agrees_with_itself(tables):
    table = tables["policy_grpo"]
    for column in table.head[1:]:
        of_seeds = [float(table.cell(seed, column)) for seed in "012"]
        half = stats.t.ppf(0.975, 2) * stats.sem(of_seeds)
        assert table.cell("mean", column).lstrip("+") == f"{np.mean(of_seeds):.3f} ± {half:.3f}"
    for seed in "012":
        last, before, gained = (
            float(table.cell(seed, c)) for c in ("1,800 steps", "before", "gained")
        )
        assert math.isclose(last - before, gained, abs_tol=1e-9)
    table = tables["preference"]
    for name, *_ in table.rows:
        (mean, half), (gain, same) = (
            table.cell(name, c).split(" ± ") for c in ("held-out accuracy", "gained")
        )
        assert half == same
        assert math.isclose(float(mean) - 0.5, float(gain), abs_tol=1e-9)


def test_an_interval_of_a_printed_table_is_widened_for_its_comparisons(tables):
    found = tables["policy_methods"].effects("to grpo")
    assert [one.label for one in found] == ["dapo", "gspo", "ctpo", "balanced"]
    dapo = found[0]
    assert dapo.low_alone == pytest.approx(0.040)
    wider = stats.t.ppf(1 - 0.05 / 8, 2) / stats.t.ppf(0.975, 2)
    assert dapo.high == pytest.approx(0.099 + 0.059 * wider)
    assert dapo.verdict == "not resolved"  # alone, it would be better
    (whole,) = tables["policy_grpo"].effects("gained")
    assert (whole.low, whole.high) == (whole.low_alone, whole.high_alone)


def test_numbers_are_quoted_from_the_tables(tables):
    def text(place):
        return quotations.quote(place, tables).text

    learned, codes = tables["codes"].scores("learned"), tables["codes"].scores("binary")
    assert text("codes/binary:+.4f") == f"{np.mean([codes[s] - learned[s] for s in codes]):+.4f}"
    assert text("codes/learned - binary:.2f") == "-0.18"
    assert text("codes/deviation of learned:.4f") == f"{np.std([*learned.values()], ddof=1):.4f}"
    assert text("policy_methods/dapo/to grpo") == "+0.099 ± 0.059"
    found = quotations.quote("codes/binary|worse", tables)
    assert found.text == "worse (+0.1834 bits/byte, 95% interval +0.0684 to +0.2984)"
    assert found.short == "worse"
    for seed in codes:
        assert f"{codes[seed] - learned[seed]:+.4f} (seed {seed})" in found.source


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("codes/binary|better", "the table says worse"),
        ("codes/binary|bad", "the table says worse"),
        ("codes/gaussian|worse", "the table says not resolved"),
        ("codes/nothing|worse", "no variant 'nothing'; valid: learned, binary"),
        ("codes/learned|worse", "'learned' is not compared; valid: binary"),
        ("nothing/binary|worse", "there is no table nothing; valid: .*codes"),
        ("codes/binary", r"add \|VERDICT, or a format"),
        ("codes/binary:%d", "add .*a format"),
        ("policy_methods/grpo/nothing", "no 'nothing'; valid: solved, gained"),
        ("policy_methods/dapo/to grpo|better", "the table says not resolved"),
        ("policy_methods/dapo/drawn tokens|better", "no interval in 'drawn tokens'"),
    ],
)
def test_a_quotation_that_the_tables_do_not_support_is_refused(tables, place, message):
    with pytest.raises(InputError, match=message):
        quotations.quote(place, tables)
