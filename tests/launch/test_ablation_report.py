"""Reports of ablations, and their tables in the results."""

import gzip
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import tiny

from launch import ablate as ablate_command
from launch import document, records, report, results
from lm.errors import InputError
from lm.studies import ablation, ablation_runs, outcomes, raw_runs


def rows(losses):
    return [
        outcomes.Row(
            "f.py", "a", "tokens", 0.95, name, seed, 6, 60, loss, loss / 2, 123.4, 10, 16.0, 0, 40,
            120, 1e3, "hash", f"{name}/seed_{seed}/metrics.jsonl",
        )
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]  # fmt: skip


LOSSES = {"a": [3.0, 3.2, 3.1], "b": [2.0, 2.21, 2.09], "c": [3.1, 3.1, 3.15]}


def test_rows_are_read_as_they_were_written(tmp_path):
    written = rows(LOSSES)
    written[0] = written[0]._replace(loss=1 / 3, tokens_per_second=math.inf)
    records.write_csv(tmp_path / "results.csv", written)
    assert records.read_csv(tmp_path / "results.csv") == written
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"other\.csv: no results\.csv"):
        records.read_csv(tmp_path / "other.csv")


class Parsed(html.parser.HTMLParser):
    def __init__(self, content):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for n, v in attributes if n in ("src", "href", "xlink:href")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("ablate") / "corpus", documents=12)


@pytest.fixture
def reported(corpus, tmp_path):
    """A report of results that were written by hand: no run has taken place."""
    from configs import ablation as form

    variants = {"a": {}, "b": {"optimizer.beta2": 0.9}, "c<i>": {}}
    variants = {name.replace("<i>", ""): keys for name, keys in variants.items()}
    config = form.make(tiny.config(data__corpus=corpus), variants, seeds=(0, 1, 2), baseline="a")
    asked = ablation.read(config)
    planned = ablation.make_plan(asked, 1)
    runs = ablation_runs.runs(planned, asked.seeds, tmp_path)
    records.write(runs, "toy.py")
    for run in runs:
        loss = LOSSES[run.planned.variant.name][run.seed]
        lines = [
            {"step": 3, "kind": "validation", "loss": loss + 1, "whole": False},
            {"step": 6, "kind": "train", "loss": 1.0, "tokens": 9, "tokens_per_second": 12.5},
            {"step": 6, "kind": "validation", "loss": loss, "bits_per_byte": loss / 2}
            | {"whole": True},
        ]
        if run.name != "c/seed_2":
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (run.folder / "metrics.jsonl").write_text(text)
    found = records.rows(asked, runs, "toy.py")
    records.write_csv(tmp_path / "results.csv", found)
    return tmp_path, asked, report.write(asked, planned, runs, found, "toy.py", tmp_path)


def test_the_report_has_the_verdicts_the_figures_and_the_differences(reported):
    folder, _, written = reported
    content = (folder / "report.html").read_text()
    parsed = Parsed(content)
    assert parsed.tags.count("svg") == 3
    assert not [link for link in parsed.links if not link.startswith("#")]
    assert "script" not in parsed.tags
    assert 'b: <span class="better">better</span>, -0.5000 bits/byte' in content
    assert "c: not resolved at 2 seeds" in written.summary
    assert "Without a result, and not in here: c/seed_2." in content
    assert "<code>optimizer.beta2=0.9</code>" in content
    assert "97.50% each (Bonferroni for 2 comparisons)" in content
    assert "#123456" not in content  # the ink is that of the page
    text = (folder / "report.md").read_text()
    assert "| b | 2.1000 ± 0.0608 | 1.0500 ± 0.0304 | 3 | -0.5000 |" in text


def test_the_same_runs_give_the_same_report(reported):
    folder, asked, _ = reported
    before = (folder / "report.html").read_bytes()
    planned = ablation.make_plan(asked, 1)
    runs = ablation_runs.runs(planned, asked.seeds, folder)
    found = records.rows(asked, runs, "toy.py")
    report.write(asked, planned, runs, found, "toy.py", folder)
    assert (folder / "report.html").read_bytes() == before


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """<script>
const axis = [...document.querySelectorAll("svg text")].find((e) => e.textContent == "b");
document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, ink: getComputedStyle(axis).fill,
  body: getComputedStyle(document.body).color, size: axis.getBoundingClientRect().height,
});
</script>"""


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser here")
def test_a_browser_shows_the_plots_in_the_ink_of_the_page(reported):
    folder, *_ = reported
    content = (folder / "report.html").read_text()
    (folder / "probe.html").write_text(content.replace("</body>", f"{PROBE}</body>"))
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,800"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [browser, *options, profile, "--dump-dom", (folder / "probe.html").as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    seen = json.loads(html.unescape(title))
    assert seen["ink"] == seen["body"]
    assert seen["size"] > 4
    assert seen["wide"] <= 500


def test_a_cell_with_a_bar_stays_one_cell():
    text = document.markdown([document.Table(["x", "y"], [["a|b", "1"]])])
    assert text.splitlines()[-1] == "| a\\|b | 1 |"


def test_a_number_that_is_not_that_of_its_run_is_found(reported):
    folder, *_ = reported
    path = folder / "results.csv"
    assert results.trace(path, folder) == []
    changed = records.read_csv(path)
    changed[1] = changed[1]._replace(loss=changed[1].loss + 1e-9)
    records.write_csv(path, changed)
    (line,) = results.trace(path, folder)
    assert line.startswith("a/seed_1/metrics.jsonl: loss is 3.2, not 3.200000001")


def test_an_ablation_is_added_to_the_results_with_its_runs(reported, tmp_path):
    folder, *_ = reported
    whole = records.read_csv(folder / "results.csv")
    table = results.collect(folder, tmp_path / "docs")
    assert table == tmp_path / "docs" / f"{folder.name}.csv"
    assert records.read_csv(table) == whole
    file = table.with_suffix(".jsonl.gz")
    assert sorted(table.parent.iterdir()) == [table, file]
    assert results.trace(table, file) == []
    # Its lines are those of the runs, and it has the same bytes whenever it is made.
    lines = (folder / whole[1].metrics).read_text().splitlines()
    chosen = [json.loads(line) for line in raw_runs.select(file, whole[1].variant, whole[1].seed)]
    assert chosen == [
        {"variant": whole[1].variant, "seed": whole[1].seed, **json.loads(line)} for line in lines
    ]
    assert len(list(raw_runs.select(file, seed=1))) == 3 * len(lines)
    before = file.read_bytes()
    (folder / whole[1].metrics).touch()
    results.collect(folder, tmp_path / "docs")
    assert file.read_bytes() == before

    runs = raw_runs.read(file)
    del runs[whole[1].variant, whole[1].seed]
    file.write_bytes(raw_runs.encode(runs))
    (line,) = results.trace(table, file)
    assert line.startswith(f"{whole[1].metrics}: there is no result")
    records.write_csv(folder / "results.csv", [whole[0]._replace(loss=0.0), *whole[1:]])
    with pytest.raises(InputError, match=r"loss is 3\.\d+, not 0\.0"):
        results.collect(folder, tmp_path / "docs")
    assert records.read_csv(table) == whole


def test_a_value_that_is_not_finite_is_the_same_in_the_file_of_runs(tmp_path):
    lines = [{"step": 1, "kind": "train", "loss": math.nan}]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(raw_runs.encode({("a", 0): lines}))
    assert repr(raw_runs.read(path)) == repr({("a", 0): lines})
    (line,) = raw_runs.select(path)
    assert json.loads(line)["not_finite"] == {"loss": "nan"}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"words", {}, "damaged: Not a gzipped file"),
        (raw_runs.encode({("a", 0): [{}]})[:-9], {}, "damaged: Compressed file ended"),
        (gzip.compress(b'{"step": 1}\n'), {}, "no file of launch.results --collect"),
        (raw_runs.encode({("a", 0): [{}]}), {"variant": "b"}, "--variant=b: .* valid: a"),
        (raw_runs.encode({("a", 0): [{}]}), {"seed": 3}, "--seed=3: .* valid: 0"),
        (raw_runs.encode({("a", 0): [{}], ("b", 1): [{}]}), {"variant": "a", "seed": 1}, "no run"),
    ],
    ids=["words", "cut", "other", "variant", "seed", "none"],
)
def test_a_file_of_runs_that_cannot_be_read_is_refused(tmp_path, content, options, message):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        raw_runs.select(path, **options)


def test_a_table_names_the_changes_to_its_config(monkeypatch):
    words = ["--config=a.py", "--config.seeds=(1, 2)", "--config.base.data.corpus=my file.jsonl"]
    monkeypatch.setattr(sys, "argv", ["launch.ablate", *words, "--workdir=runs/a"])
    assert ablate_command._changes() == ["'--config.base.data.corpus=my file.jsonl'"]


def test_a_title_is_that_of_the_file(reported):
    folder, asked, _ = reported
    planned = ablation.make_plan(asked, 1)
    runs = ablation_runs.runs(planned, asked.seeds, folder)
    found = records.rows(asked, runs, "toy.py")
    name = "configs/ablations/toy.py:2 --config.base.data.corpus=english.jsonl"
    report.write(asked, planned, runs, found, name, folder)
    text = (folder / "report.md").read_text()
    assert text.startswith("# Ablation toy\n")
    assert f"`python -m launch.ablate --config={name}`" in text
