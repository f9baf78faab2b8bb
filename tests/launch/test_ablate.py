"""Ablations as a user runs them: processes, files, kills; and the README's own example."""

import json
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

from launch import processes, records, results

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
