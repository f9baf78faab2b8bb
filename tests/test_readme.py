"""The README's patches apply and run, and its two commands are those of .ci/run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PATCHES = re.findall(r"```diff\n(.*?)```\s*```bash\n(.*?)```", README, flags=re.DOTALL)
SMALL = (
    "--config.model.layers=1 --config.model.width=32 --config.model.mlp_width=32 "
    "--config.data.sequence_length=32 --config.data.validation_fraction=0.3 "
    "--config.data.shuffle_rows=8 --config.train.steps=3 "
    "--config.train.log_every=1 --config.optimizer.warmup_steps=1 --config.evaluation.batches=1 "
    "--config.evaluation.sample_tokens=0 --config.train.tensorboard=False"
)


def test_there_are_patches():
    assert len(PATCHES) == 3


def test_a_weighting_of_ones_own_is_short():
    section = README.split("### Add your own weighting\n")[1].split("\n### ")[0]
    ((patch, command),) = [one for one in PATCHES if one[0] in section]
    added = re.findall(r"^\+(?!\+\+ )", patch, flags=re.MULTILINE)
    assert len(added) < 20
    assert "objective.weighting=with_context" in command


@pytest.mark.parametrize("number", range(len(PATCHES)))
def test_a_patch_applies_and_runs(number, tmp_path):
    patch, command = PATCHES[number]
    for folder in ("lm", "objectives", "launch", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    # Outside of any repository, git apply is a patch program.
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    small = SMALL
    if "data.corpus" not in command:
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        for i in range(20):
            (corpus / f"{i}.txt").write_text(f"text number {i} " * 40)
        small += f" --config.data.corpus={corpus}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(tmp_path)
    arguments = command.strip().removeprefix("python ").split() + small.split()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stderr
    assert "bits/byte" in done.stdout


def test_ci_runs_the_two_commands_of_the_readme():
    setup = r"^python3 -m venv \.venv && .*"
    assert len(re.findall(setup + r"launch\.train.*quickstart.*", README, flags=re.MULTILINE)) == 1
    assert len(re.findall(setup + r"pytest.*", README, flags=re.MULTILINE)) == 1


def test_every_command_of_the_table_exists():
    commands = set(re.findall(r"python -m launch\.(\w+)", README))
    here = {p.stem for p in (ROOT / "launch").glob("*.py")} - {
        "__init__",
        "command",
        "distributed",
        "workdir",
        "page",
        "document",
        "figures",
        "processes",
        "records",
        "report",
        "scaling_report",
    }
    assert commands == here


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
