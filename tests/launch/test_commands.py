"""The commands as a user types them: real processes and real files."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tiny

from launch import generate
from lm.data import corpora

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "--config=configs/base.py",
    *(
        f"--config.{key}"
        for key in [
            "model.layers=2",
            "model.width=32",
            "model.heads=4",
            "model.kv_heads=2",
            "model.mlp_width=64",
            "data.sequence_length=32",
            "data.shuffle_rows=8",
            "data.validation_fraction=0.3",
            "train.steps=6",
            "train.batch_size=8",
            "train.log_every=1",
            "optimizer.warmup_steps=2",
            "evaluation.batches=1",
            "evaluation.every_steps=0",
            "evaluation.sample_tokens=0",
        ]
    ),
]


def command(name, *arguments, check=True, **options):
    environment = tiny.one_device()
    process = subprocess.Popen(
        [sys.executable, "-W", "error::DeprecationWarning", "-m", f"launch.{name}"]
        + [str(a) for a in arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    if not check:
        return process
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def lines(workdir):
    read = [
        json.loads(line) for line in (ROOT / workdir / "metrics.jsonl").read_text().splitlines()
    ]
    for line in read:
        line.pop("tokens_per_second", None)
    return read


def listing(folder):
    return {str(p): p.stat().st_mtime_ns for p in (ROOT / folder).rglob("*")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A work directory, given as a relative path, and what the command printed."""
    workdir = Path(os.path.relpath(tmp_path_factory.mktemp("run"), ROOT))
    arguments = [*TINY, f"--config.data.corpus={corpus}", f"--workdir={workdir}"]
    return workdir, *command("train", *arguments)


def test_train_ends_with_its_figures_and_the_next_command(trained):
    workdir, out, err = trained
    assert "step 6/6  loss" in err
    assert "tokens/s" in err
    last = [line for line in lines(workdir) if line["kind"] == "validation"][-1]
    assert f"{last['bits_per_byte']:.4f} bits/byte" in out
    assert f"{workdir}/checkpoints/6" in out
    assert f"next: python -m launch.generate --model={workdir}" in out


def test_evaluate_gives_the_loss_of_the_run(trained):
    workdir, *_ = trained
    last = [line for line in lines(workdir) if line["kind"] == "validation"][-1]
    out, _ = command("evaluate", f"--workdir={workdir}")
    assert f"loss: {last['loss']:.4f} nats/token" in out
    assert f"bits per byte: {last['bits_per_byte']:.4f}" in out
    out, _ = command("evaluate", f"--workdir={workdir}", "--split=train")
    assert f"loss: {last['loss']:.4f}" not in out


@pytest.mark.slow
def test_a_corpus_of_samples_goes_on_after_a_kill(trained, tmp_path):
    """The file is the same as without one, is a corpus, and holds no samples of other options."""
    workdir, *_ = trained
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    arguments = [f"--workdir={workdir}", "--prompt=alpha", "--tokens=9", "--count=20"]
    command("generate", *arguments, f"--samples={whole}")
    lines = whole.read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 20
    assert len(set(texts)) > 10
    assert all(text.startswith("alpha") and len(text) > 5 for text in texts)
    cut.write_text("\n".join(lines[:18]) + "\n" + lines[18][:30])
    _, err = command("generate", *arguments, f"--samples={cut}")
    assert f"{cut}: 20 texts, 18 of them there before" in err
    assert cut.read_bytes() == whole.read_bytes()
    other = command("generate", *arguments, f"--samples={cut}", "--seed=1", check=False)
    _, err = other.communicate(timeout=300)
    assert other.returncode == 2
    assert f"error: {cut}:1 was not drawn by this command with these options" in err
    assert cut.read_bytes() == whole.read_bytes()
    (corpus,) = corpora.load(str(whole), "train", directory="", validation_fraction=0.3)
    assert {corpus.documents[i].spans[0][0] for i in range(len(corpus.documents))} < set(texts)


def test_generate_continues_the_prompt(trained):
    workdir, *_ = trained
    arguments = [f"--workdir={workdir}", "--prompt=alpha beta", "--tokens=23"]
    out, err = command("generate", *arguments)
    assert out.startswith("alpha beta")
    assert len(out) > len("alpha beta\n")
    (warning,) = (line for line in err.splitlines() if line.startswith("warning"))
    assert "10 tokens and --tokens=23 exceed the data.sequence_length=32" in warning
    assert command("generate", *arguments)[0] == out  # the same seed
    assert generate.too_long(10, 22, 32) == ""


@pytest.mark.slow
def test_two_runs_are_bit_identical(trained, corpus, tmp_path):
    workdir, *_ = trained
    command("train", *TINY, f"--config.data.corpus={corpus}", f"--workdir={tmp_path}")
    assert lines(tmp_path) == lines(workdir)


@pytest.mark.slow
def test_a_work_directory_of_another_model_is_refused_and_untouched(trained, corpus):
    workdir, *_ = trained
    before = listing(workdir)
    arguments = [*TINY, f"--config.data.corpus={corpus}", "--config.model.width=64"]
    process = command("train", *arguments, f"--workdir={workdir}", check=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "model.width=32, not 64" in err
    assert listing(workdir) == before


@pytest.mark.slow
def test_no_readable_checkpoint_is_an_error_and_not_a_new_start(trained, corpus, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(ROOT / trained[0], workdir)
    for path in (workdir / "checkpoints").glob("*/state/**/*"):
        if path.is_file():
            path.unlink()
    arguments = [*TINY, f"--config.data.corpus={corpus}", f"--workdir={workdir}"]
    process = command("train", *arguments, check=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "can be read" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    tiny.rows_mostly_slow(
        [
            ("evaluate", ["--workdir=/nowhere"], "no config.json"),
            ("evaluate", ["--workdir=WORKDIR", "--split=test"], "--split=test"),
            ("evaluate", ["--workdir=WORKDIR", "--step=5"], "no checkpoint 5"),
            ("score", ["--workdir=WORKDIR"], "--output=FOLDER is missing"),
            ("score", ["--workdir=WORKDIR", "--output=launch"], "--output=launch is there already"),
            ("score", ["--workdir=WORKDIR", "--output=x", "--split=test"], "--split=test"),
            (
                "score",
                ["--workdir=WORKDIR", "--output=x", "--name=nll"],
                "--name=nll is not one of",
            ),
            ("score", ["--workdir=WORKDIR", "--output=x", "--against=launch"], "--against=launch"),
            ("score", ["--workdir=WORKDIR", "--output=gs://b/x"], "not a local folder"),
            (
                "score",
                ["--workdir=WORKDIR", "--output=x", "--faulty=launch/no"],
                "launch/no: no such",
            ),
            (
                "score",
                ["--workdir=WORKDIR", "--output=x", "--faulty=y", "--name=z"],
                "goes with none",
            ),
            ("generate", ["--workdir=WORKDIR", "--top_p=0"], "--top_p=0"),
            ("generate", ["--workdir=WORKDIR", "--tokens=0"], "--tokens=0"),
            ("generate", ["--workdir=WORKDIR", "--count=2"], "--samples=FILE.jsonl go together"),
        ],
        (2, 4, 12),
    ),
)
def test_other_commands_refuse_bad_input(trained, name, arguments, expected):
    arguments = [a.replace("WORKDIR", str(trained[0])) for a in arguments]
    process = command(name, *arguments, check=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert expected in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.slow
def test_score_stores_the_losses_of_the_run(trained, corpus, tmp_path):
    """The weighted mean of the scores is the loss that evaluate finds; training reads them."""
    workdir, *_ = trained
    folder = tmp_path / "scores"
    left = tmp_path / ".scores.unfinished-1"  # As a killed run leaves it.
    left.mkdir()
    out, _ = command("score", f"--workdir={workdir}", f"--output={folder}")
    assert f"--config.objective.references.reference_nll={folder}" in out
    assert f"scores: {folder}" in out
    assert sorted(p.name for p in folder.iterdir()) == ["0.array_record", "scores.json"]
    header = json.loads((folder / "scores.json").read_text())
    assert header["names"] == ["reference_nll"]
    assert header["origin"]["step"] == 6
    assert header["origin"]["sequence_length"] == 32
    mean = float(out.split("mean ")[1].split()[0])
    evaluated, _ = command("evaluate", f"--workdir={workdir}", "--split=train")
    # Windows of a document begin where it does, and not where the row before has ended.
    assert abs(mean - float(evaluated.split("loss: ")[1].split()[0])) < 0.05
    _, err = command(
        "train",
        *TINY,
        f"--config.data.corpus={corpus}",
        f"--workdir={tmp_path / 'run'}",
        "--config.objective.weighting=rho1",
        f"--config.objective.references.reference_nll={folder}",
        "--config.data.workers=1",
    )
    assert "step 6/6" in err
    kept = [line["kept_share"] for line in lines(tmp_path / "run") if line["kind"] == "train"]
    assert all(abs(share - 0.6) < 0.01 for share in kept)


@pytest.mark.slow
def test_a_killed_score_leaves_nothing_that_looks_whole(trained, corpus, tmp_path):
    workdir, *_ = trained
    arguments = [f"--workdir={workdir}", f"--output={tmp_path / 'scores'}"]
    process = command("score", *arguments, check=False)
    while not list(tmp_path.glob(".scores.unfinished-*/*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not (tmp_path / "scores").exists():  # Killed in time, as nearly always.
        (left,) = tmp_path.iterdir()
        assert not (left / "scores.json").exists()
        command("score", *arguments)
    assert (tmp_path / "scores" / "scores.json").exists()


@pytest.mark.slow
def test_scores_of_other_text_end_a_run_with_exit_code_2(trained, corpus, tmp_path):
    workdir, *_ = trained
    text, folder, run = tmp_path / "text", tmp_path / "scores", tmp_path / "run"
    shutil.copytree(corpus, text)
    command("score", f"--workdir={workdir}", f"--corpus={text}", f"--output={folder}")
    arguments = [
        *TINY,
        f"--config.data.corpus={text}",
        f"--workdir={run}",
        "--config.objective.weighting=rho1",
        f"--config.objective.references.reference_nll={folder}",
        "--config.train.steps=100000",
        "--config.checkpoint.every_steps=2",
        "--config.data.workers=1",
    ]
    process = command("train", *arguments, check=False)
    while not any(p.name.isdigit() for p in (run / "checkpoints").glob("*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    for file in text.iterdir():
        file.write_text(file.read_text() + " more")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    (refused,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "are those of other text: run launch.score again" in refused
    assert "Traceback" not in err
    # At the next start the corpus itself is known to be another.
    process = command("train", *arguments, check=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "are not those of the training documents of data.corpus" in err
    assert command("evaluate", f"--workdir={run}", f"--corpus={corpus}")  # What was saved is sound.


@pytest.mark.slow
def test_a_progress_bar_only_on_a_terminal(trained, corpus, tmp_path):
    assert "%|" not in trained[2]
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    arguments = [*TINY, f"--config.data.corpus={corpus}", f"--workdir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.train", *arguments],
        cwd=ROOT,
        env=tiny.one_device(),
        stdout=subprocess.DEVNULL,
        stderr=child,
    )
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while chunk := os.read(parent, 4096):
            shown += chunk
    os.close(parent)
    assert process.wait(timeout=60) == 0
    assert b"100%|" in shown
    assert b"\rstep 6: validation loss" in shown  # above the bar, on a line of its own


def test_a_reader_that_closes_early_is_no_error():
    """As `python -m launch.plan --methods | head` does."""
    with subprocess.Popen(
        [sys.executable, "-m", "launch.plan", "--methods"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 0)
