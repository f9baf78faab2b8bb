"""A teacher is stored and a student learns from it, by the commands; and what is refused."""

import json

import pytest
import tiny
from test_commands import TINY, command, lines

BPE = ["--config.data.tokenizer=bpe", "--config.data.vocab_size=270"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A run with a byte-pair encoding."""
    workdir = tmp_path_factory.mktemp("teacher")
    arguments = [*TINY, *BPE, f"--config.data.corpus={corpus}", f"--workdir={workdir}"]
    command("train", *arguments)
    return workdir


def refused(name, *arguments):
    process = command(name, *arguments, check=False)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    return line


def learns(workdir, *arguments):
    """Metrics of the train steps of a student."""
    command("train", *TINY, *arguments, f"--workdir={workdir}")
    found = [line for line in lines(workdir) if line["kind"] == "train"]
    assert len(found) == 6
    assert found[-1]["skipped_steps"] == 0
    assert all(line["loss"] > 0 for line in found)
    return found


@pytest.mark.slow
def test_a_student_of_the_same_tokens_learns_from_the_largest(teacher, corpus, tmp_path):
    folder = tmp_path / "top_k"
    arguments = [f"--model={teacher}", "--name=teacher_top_k", "--largest=8"]
    out, _ = command("score", *arguments, f"--output={folder}")
    assert f"... --config.objective.references.teacher_top_k={folder}" in out
    mass = float(out.split("mean sum of the probabilities ")[1].split()[0])
    assert 8 / 270 < mass < 1
    header = json.loads((folder / "scores.json").read_text())
    assert header["fields"]["teacher_ids"] == {"dtype": "int32", "width": 8}
    student = [f"--config.data.corpus={corpus}", "--config.objective.loss=top_k_distillation"]
    stored = f"--config.objective.references.teacher_top_k={folder}"
    found = learns(tmp_path / "student", *BPE, *student, stored)
    assert found[0]["nll"] > found[-1]["nll"]
    line = refused("train", *TINY, *student, stored, f"--workdir={tmp_path / 'bytes'}")
    assert "objective.references.teacher_top_k: scores in" in line
    assert "were made with the tokenizer" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("chunk_log_probability", ["--config.objective.name=alm"]),
        ("teacher_sorted", ["--config.objective.loss=uld"]),
    ],
)
def test_a_student_of_bytes_learns_from_a_teacher_of_other_tokens(
    name, keys, teacher, corpus, tmp_path
):
    folder = tmp_path / "stored"
    stored = f"--config.objective.references.{name}={folder}"
    student = [*TINY, f"--config.data.corpus={corpus}", stored]
    option = "--largest=300" if name == "teacher_sorted" else "--merge=0.02"
    arguments = [f"--model={teacher}", f"--name={name}", option, *student]
    out, _ = command("score", *arguments, f"--output={folder}")
    assert f"{name}: " in out
    header = json.loads((folder / "scores.json").read_text())
    assert header["tokenizer"] == "bytes"
    found = learns(tmp_path / "student", *student[len(TINY) :], *keys)
    assert found[0]["nll"] > found[-1]["nll"]
    if name == "teacher_sorted":
        # All entries of both are there: a distance of at most 2 on top of the likelihood.
        assert all(line["nll"] < line["loss"] < line["nll"] + 2 for line in found)
        assert "mean sum of the probabilities 1.0000" in out
    else:
        assert all(line["chunk_tokens"] > 1 and line["chunks"] > 10 for line in found)


@pytest.mark.slow
def test_what_does_not_go_together_is_one_line(teacher, corpus, tmp_path):
    score = [f"--model={teacher}", f"--output={tmp_path / 'x'}"]
    cases = [
        (["--name=teacher_sorted"], "--config=FILE.py of its training is missing"),
        (["--name=teacher_top_k", "--largest=500"], "--largest=500 is more than the 270 tokens"),
        (["--largest=5"], "--largest=5 is for --name=teacher_top_k and --name=teacher_sorted"),
        (["--merge=0.1"], "--merge=0.1 must be at least 0 and below 1, and is for"),
    ]
    for arguments, message in cases:
        assert message in refused("score", *score, *arguments)
    # A teacher of other tokens in the step itself.
    line = refused(
        "train",
        *TINY,
        f"--config.data.corpus={corpus}",
        f"--workdir={tmp_path / 'run'}",
        "--config.objective.loss=distillation",
        f"--config.objective.references.teacher={teacher}",
    )
    assert "has the vocabulary 270, not 257" in line
    assert "objective.name='alm' or objective.loss='uld'" in line
