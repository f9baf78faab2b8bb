"""Ablations as a user runs them: processes, files, reports, kills; and the README's own example."""

import gzip
import html.parser
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from launch import ablate as ablate_command
from launch import document, processes, records, report, results
from lm.errors import InputError
from lm.studies import ablation, ablation_runs, outcomes, raw_runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
FILE = '''
"""An ablation of a toy."""

from configs import ablation, base


def get_config():
    c = base.get_config()
    c.model.update(layers=1, width=32, heads=4, kv_heads=2, mlp_width=32)
    c.data.update(corpus={corpus!r}, sequence_length=32, shuffle_rows=8, validation_fraction=0.3)
    c.train.update(steps={steps}, batch_size=4, log_every=1, tensorboard=False, max_skips=1)
    c.optimizer.update(warmup_steps=1, schedule="wsd")
    c.evaluation.update(every_steps=2, batches=1, sample_tokens=0)
    variants = {variants!r}
    return ablation.make(c, variants, seeds={seeds}, baseline="a")
'''
QAT = {"quantization.bits": 4.0, "quantization.fraction": "0.5", "quantization.from": "{a}"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("ablate") / "corpus", documents=12)


def write(path, corpus, variants, seeds=(0, 1), steps=4):
    path.write_text(FILE.format(corpus=corpus, variants=variants, seeds=seeds, steps=steps))
    return path


def ablate(*arguments, check=True, **options):
    environment = tiny.one_device()
    options = {"cwd": ROOT, "env": environment} | options
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.ablate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    if not check:
        return process
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def cells(folder):
    """results.csv without the speeds, which differ between runs."""
    rows = records.read_csv(folder / "results.csv")
    return [row._replace(tokens_per_second=0.0) for row in rows]


@pytest.fixture(scope="module")
def ran(corpus, tmp_path_factory):
    """An ablation with two good variants and one that fails, and one that needs that one."""
    folder = tmp_path_factory.mktemp("ran")
    variants = {
        "a": {},
        "qat": QAT,
        "rtn": {"quantize.run": "{a}", "quantize.bits": 4},
        "fails": {"optimizer.peak_learning_rate": 1e38},
        "after": QAT | {"optimizer.peak_learning_rate": 1e38, "quantization.from": "{fails}"},
    }
    file = write(folder / "toy.py", corpus, variants, seeds=(0,))
    return file, folder / "run", *ablate(f"--config={file}", f"--workdir={folder / 'run'}")


def test_all_variants_run_but_one_that_fails_and_the_one_that_needs_it(ran):
    _, folder, code, out, err = ran
    assert code == 1, err
    assert "fails/seed_0: failed with exit code 1: aborted: 1 steps in a row were skipped" in err
    assert "after/seed_0: not started, fails/seed_0 has failed" in err
    assert "4 trainings of 4 variants and 1 seed: 2,048 tokens" in out
    assert "with which nothing can be resolved" in out
    assert [row.variant for row in cells(folder)] == ["a", "qat", "rtn"]
    written = (folder / "report.md").read_text()
    assert "Without a result, and not in here: fails/seed_0, after/seed_0" in written
    # The quantized variant began with the checkpoint at the switch, and trained only the rest.
    steps = [
        json.loads(line)["step"]
        for line in (folder / "qat" / "seed_0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert min(steps) >= 2
    assert results.trace(folder / "results.csv", folder) == []


def test_status_reads_the_files_of_the_runs(ran):
    file, folder, *_ = ran
    code, out, _ = ablate(f"--config={file}", f"--workdir={folder}", "--status")
    assert code == 0
    assert re.search(r"^a/seed_0 +done +4/4 +\d\.\d{4}", out, re.MULTILINE)
    assert re.search(r"^fails/seed_0 +failed .*aborted: 1 steps", out, re.MULTILINE)
    assert "3 done, 1 failed, 1 waiting" in out


def test_a_deleted_variant_alone_is_run_again_and_gives_the_same_table(ran):
    file, folder, *_ = ran
    before, report_before = cells(folder), (folder / "report.md").read_text()
    times = {p: p.stat().st_mtime_ns for p in folder.glob("[ar]*/seed_*/metrics.jsonl")}
    shutil.rmtree(folder / "qat")
    code, _, err = ablate(f"--config={file}", f"--workdir={folder}")
    assert code == 1  # fails fails again
    assert re.findall(r"(\S+): started", err) == ["qat/seed_0", "fails/seed_0"]
    assert cells(folder) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times
    table = report_before.split("## Cost")[0]
    assert (folder / "report.md").read_text().split("## Cost")[0] == table


def test_a_folder_of_another_config_is_refused(ran):
    file, folder, *_ = ran
    code, _, err = ablate(
        f"--config={file}", f"--workdir={folder}", "--config.base.optimizer.beta2=0.9"
    )
    assert code == 2
    assert "a/seed_0 holds a run with optimizer.beta2=0.98, not 0.9: delete the folder" in err


def test_a_wrong_key_is_one_line_and_nothing_is_written(corpus, tmp_path):
    file = write(tmp_path / "bad.py", corpus, {"a": {}, "b": {"model.withd": 3}})
    code, out, err = ablate(f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("error: variant 'b': no such key model.withd")
    assert "did you mean model.width" in err
    assert not (tmp_path / "run").exists()


def test_jobs_are_a_script_that_submits_in_order(corpus, tmp_path):
    file = write(tmp_path / "toy.py", corpus, {"qat": QAT, "a": {}}, seeds=(0,))
    code, out, err = ablate(f"--config={file}", f"--workdir={tmp_path / 'run'}", "--jobs=slurm")
    assert code == 0, err
    script = out[out.index("#!/bin/sh") :]
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$@" >> "$0.log"\nwc -l < "$0.log"\n')
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", script], env=os.environ | {"PATH": path}, check=True)
    first, second = (tmp_path / "sbatch.log").read_text().splitlines()
    assert "--job-name=a/seed_0 --wrap=python -m launch.train --config=" in first
    assert "--dependency=afterok:1 " in second
    assert f"--workdir={tmp_path}/run/qat/seed_0" in second
    assert not (tmp_path / "run" / "a" / "seed_0" / "metrics.jsonl").exists()
    code, _, err = ablate(f"--config={file}", f"--workdir={tmp_path / 'run'}", "--jobs=pod")
    assert code == 2
    assert "qat/seed_0 needs" in err


def test_the_example_of_the_docs_runs(corpus, tmp_path):
    readme = (ROOT / "docs" / "ablations.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.splitlines()) <= 25
    (line,) = re.findall(r"^python -m launch\.ablate --config=configs.*$", readme, re.MULTILINE)
    name = re.search(r"--config=(\S+)", line)[1]
    for part in ("lm", "objectives", "launch", "configs"):
        shutil.copytree(ROOT / part, tmp_path / part)
    (tmp_path / name).write_text(example)
    keys = {
        "seeds": "(0,)",
        "base.model.layers": 1,
        "base.model.unroll": 1,
        "base.model.width": 32,
        "base.model.mlp_width": 340,
        "base.data.corpus": corpus,
        "base.data.tokenizer": "bytes",
        "base.data.vocab_size": 0,
        "base.data.sequence_length": 32,
        "base.data.validation_fraction": 0.3,
        "base.train.steps": 3,
        "base.train.batch_size": 2,
        "base.train.log_every": 1,
        "base.optimizer.warmup_steps": 1,
    }
    arguments = line.removeprefix("python -m launch.ablate ").split()
    arguments += [f"--config.{key}={value}" for key, value in keys.items()]
    environment = tiny.one_device(PYTHONPATH=tmp_path)
    code, out, err = ablate(*arguments, "--processes=2", cwd=tmp_path, env=environment)
    assert code == 0, err
    assert out.count("bits/byte at one seed") == 3
    folder = tmp_path / re.search(r"--workdir=(\S+)", line)[1]
    assert len(cells(folder)) == 4
    assert "peak_learning_rate=0.0025" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_and_gives_the_same_numbers(corpus, tmp_path):
    variants = {"a": {}, "b": {"model.mlp_width": 48}}
    file = write(tmp_path / "toy.py", corpus, variants, seeds=(0,), steps=60)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert ablate(f"--config={file}", f"--workdir={whole}")[0] == 0
    process = ablate(f"--config={file}", f"--workdir={cut}", check=False)
    metrics = cut / "a" / "seed_0" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 20:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped by a signal" in err
    assert not processes.is_locked(cut / "a" / "seed_0")
    assert "b/seed_0: started" not in err
    code, _, err = ablate(f"--config={file}", f"--workdir={cut}")
    assert code == 0, err
    assert "resumed at step" in (cut / "a" / "seed_0" / "log.txt").read_text()
    assert cells(cut) == cells(whole)


def job(folder, name, code, needs=()):
    place = folder / name
    place.mkdir()
    script = f"import pathlib, time\nhere = pathlib.Path({str(place)!r})\n{code}"
    command = (sys.executable, "-c", script)
    return processes.Job(
        name, command, place, tuple(folder / n for n in needs), (place / "done").exists
    )


END = "(here / 'done').touch()"


def run(jobs, count=1, stopped=lambda: False):
    said = []
    return processes.run_all(jobs, count, os.environ, said.append, stopped), said


def test_jobs_run_after_what_they_need_and_a_failure_stops_only_those(tmp_path):
    jobs = [
        job(tmp_path, "a", END),
        job(tmp_path, "b", "print('because')\nraise SystemExit(3)"),
        job(tmp_path, "c", END, ["b"]),
        job(tmp_path, "d", END, ["c"]),
        job(tmp_path, "e", f"assert (here.parent / 'a' / 'done').exists()\n{END}", ["a"]),
        job(tmp_path, "f", "raise AssertionError"),
    ]  # fmt: skip
    (tmp_path / "f" / "done").touch()
    failed, said = run(jobs, count=3)
    assert sorted(failed) == ["b", "c", "d"]
    assert "b: failed with exit code 3: because" in said
    assert processes.state(tmp_path / "b", False) == "failed"
    assert processes.state(tmp_path / "c", False) == "waiting"
    assert not any(line.startswith("f: started") for line in said)
    assert (tmp_path / "e" / "done").exists()


def test_a_job_that_ends_without_its_result_has_failed(tmp_path):
    failed, _ = run([job(tmp_path, "a", "")])
    assert failed == ["a"]


def test_as_many_jobs_as_asked_for_run_at_a_time(tmp_path):
    code = f"(here / 'begun').touch()\ntime.sleep(0.6)\n{END}"
    jobs = [job(tmp_path, name, code) for name in "abcd"]
    seen = []

    def watch():
        begun, done = (len(list(tmp_path.glob(f"*/{kind}"))) for kind in ("begun", "done"))
        seen.append(begun - done)
        return False

    run(jobs, 2, watch)
    assert max(seen) == 2


def test_a_signal_is_passed_on_once_and_nothing_else_starts(tmp_path):
    code = (
        "import signal\nsignal.signal(signal.SIGTERM, lambda *_: (here / 'told').touch())\n"
        "(here / 'ready').touch()\n"
        "while not (here / 'told').exists(): time.sleep(0.01)"
    )
    jobs = [job(tmp_path, "a", code), job(tmp_path, "b", END)]
    failed, said = run(jobs, 1, lambda: (tmp_path / "a" / "ready").exists())
    assert failed == []
    assert (tmp_path / "a" / "told").exists()
    assert [line for line in said if "b" in line.split(":")[0]] == []
    assert processes.state(tmp_path / "a", False) == "cut"


def test_a_running_process_keeps_its_lock_when_its_parent_is_gone(tmp_path):
    one = job(tmp_path, "a", "time.sleep(30)")
    process = processes._start(one, os.environ)
    try:
        assert processes.is_locked(one.folder)
        assert processes.state(one.folder, False) == "running"
    finally:
        process.kill()
        process.wait()
    assert not processes.is_locked(one.folder)


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
