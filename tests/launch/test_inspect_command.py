"""launch.inspect as a command: the page that it writes, and what it refuses."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from test_inspect import ROOT, TEXT, Parsed

from launch import inspect
from lm.errors import InputError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work directory of a short run."""
    folder = tmp_path_factory.mktemp("inspect")
    corpus = tiny.write_corpus(folder / "corpus")
    keys = {
        "model.layers": 1,
        "model.width": 32,
        "model.mlp_width": 32,
        "data.sequence_length": 32,
        "data.shuffle_rows": 8,
        "data.validation_fraction": 0.3,
        "data.corpus": corpus,
        "train.steps": 2,
        "train.batch_size": 4,
        "train.tensorboard": False,
        "optimizer.warmup_steps": 1,
        "evaluation.batches": 1,
        "evaluation.sample_tokens": 0,
    }
    arguments = [f"--config.{key}={value}" for key, value in keys.items()]
    done = launch("train", "--config=configs/base.py", f"--workdir={folder / 'run'}", *arguments)
    assert done.returncode == 0, done.stderr
    (folder / "text.py").write_text(TEXT)
    (folder / "empty.txt").write_text("")
    (folder / "binary").write_bytes(b"a\0b")
    return folder


def launch(name, *arguments):
    environment = tiny.one_device()
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_writes_one_page(trained):
    output = trained / "page.html"
    done = launch(
        "inspect",
        f"--workdir={trained / 'run'}",
        f"--text={trained / 'text.py'}",
        f"--output={output}",
        "--weighting=rho1",
        "--objective=rho1.keep=0.5",
        f"--objective=references.reference_nll={trained / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    content = output.read_text(encoding="utf-8")
    seen = Parsed(content)
    assert seen.texts == [TEXT]
    assert "rho1(keep=0.5), normalisation kept, reference_nll from run" in content
    # The run compared with itself: no token is above another, and all are kept.
    np.testing.assert_array_equal(seen.column("reference_nll"), seen.column("loss"))
    np.testing.assert_array_equal(seen.column("weight"), 1)
    assert not list(trained.glob("*.part"))


SOURCE = "references.reference_nll="
BAD = {
    "no text": ({"text": None}, "--text=FILE is missing"),
    "missing": ({"text": "nothing.txt"}, "nothing.txt: no such file"),
    "empty": ({"text": "empty.txt"}, "empty.txt: there is no text in it"),
    "binary": ({"text": "binary"}, "NUL byte"),
    "no run": ({"workdir": "corpus"}, "holds no run"),
    "output": ({"output": "nowhere/page.html"}, "is not a file in a folder"),
    "weighting": ({"weighting": "rho"}, "did you mean 'rho1'"),
    "reference": ({"weighting": "rho1"}, "needs objective.references.reference_nll"),
    "table": (
        {"weighting": "glow", "objective": ["glow.samples=9"]},
        "needs sample_ids of training documents",
    ),
    "source": ({"weighting": "rho1", "objective": [SOURCE + "corpus"]}, "='corpus' is none of"),
    "key": ({"objective": ["rho1.kep=1"]}, "did you mean rho1.keep"),
    "value": ({"objective": ["rho1.keep=much"]}, "'much' is no float"),
}


def test_what_is_stored_is_told_what_can_be_shown_instead():
    told = inspect._no_scores("reference_nll")
    assert "--objective=references.reference_nll=SOURCE, one of 'ema' with" in told
    assert "launch.score" not in told
    told = inspect._no_scores("better_nll")
    assert "what needs it has no page" in told
    assert "=SOURCE" not in told


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, trained, monkeypatch):
    monkeypatch.chdir(trained)
    given, message = BAD[case]
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["inspect"])
    chosen = {"workdir": "run", "text": "text.py", "output": "bad.html"} | given
    with flagsaver.flagsaver(**chosen), pytest.raises(InputError, match=re.escape(message)) as e:
        inspect.main()
    assert "\n" not in str(e.value)
    assert not Path("bad.html").exists()
