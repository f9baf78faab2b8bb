"""The exercises of docs/extend.md: each patch applies to a copy of this repository, and trains."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config.model.layers=1 --config.model.width=32 --config.model.mlp_width=32 "
    "--config.data.sequence_length=32 --config.data.validation_fraction=0.2 "
    "--config.data.shuffle_rows=8 --config.train.steps=3 --config.train.log_every=1 "
    "--config.optimizer.warmup_steps=1 --config.evaluation.batches=1 "
    "--config.evaluation.sample_tokens=0 --config.train.tensorboard=False "
)


def copy_and_patch(patch: str, folder: Path) -> None:
    """Copies the packages of this repository to `folder` and applies the patch there."""
    for name in ("lm", "objectives", "launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    text = (ROOT / "docs" / "patches" / patch).read_text()
    # Outside of any repository, git apply is a patch program.
    subprocess.run(["git", "apply", "-"], input=text, text=True, cwd=folder, check=True)


def train(patch: str, folder: Path, arguments: str) -> list[dict]:
    """The lines of the training steps of a run in a patched copy."""
    copy_and_patch(patch, folder)
    environment = tiny.one_device(PYTHONPATH=folder)
    command = f"-m launch.train --config=configs/base.py --workdir=run {SMALL} {arguments}"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("name", ["second_head", "hinge"])
def test_a_patch_touches_at_most_four_files(name):
    text = (ROOT / "docs" / "patches" / f"{name}.patch").read_text()
    assert 1 < len(re.findall(r"^diff --git", text, flags=re.MULTILINE)) <= 4


@pytest.mark.parametrize("name", ["second_head", "hinge"])
def test_a_patch_applies(name, tmp_path):
    copy_and_patch(f"{name}.patch", tmp_path / "copy")


@pytest.mark.slow
def test_a_second_head_learns_the_token_after_next(tmp_path):
    """At first it is the first head, trained from zero on top of it: both are near log V."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(f"text number {i} " * 40)
    lines = train(
        "second_head.patch",
        tmp_path / "copy",
        f"--config.objective.name=second_head --config.data.corpus={corpus}",
    )
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(abs(line["second_head"] - math.log(257)) < 2 for line in lines)
    assert lines[2]["second_head"] < lines[0]["second_head"]
    assert lines[0]["second_head"] != lines[0]["loss"]


@pytest.mark.slow
def test_a_hinge_widens_the_margin(tmp_path):
    """It is convex: its mean over pairs is at least that of the mean margin. Two micro-batches."""
    pairs = [
        {"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": f" {2 * i}!"}
        for i in range(200)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    lines = train(
        "hinge.patch",
        tmp_path / "copy",
        f"--config.data.corpus={tmp_path}/pairs.jsonl --config.data.packing=best_fit "
        "--config.objective.name=hinge --config.objective.hinge.delta=9 "
        "--config.train.accumulation=2",
    )
    for line in lines:
        assert line["loss"] >= 9 - line["margin"] - 1e-4
        assert line["loss"] > 0
    assert lines[2]["margin"] > lines[0]["margin"]
    assert lines[2]["loss"] < lines[0]["loss"]
