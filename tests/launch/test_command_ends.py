"""Commands that are killed or stopped, or given what is wrong: real processes."""

import random
import signal
import time

import pytest
import tiny
from test_commands import TINY, command, lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(corpus, tmp_path):
    """SIGKILL at a random moment, and a second start: the same metrics as without."""
    arguments = [
        *TINY,
        f"--config.data.corpus={corpus}",
        "--config.train.steps=40",
        "--config.checkpoint.every_steps=4",
        "--config.train.accumulation=2",
    ]
    command("train", *arguments, f"--workdir={tmp_path / 'whole'}")
    cut = tmp_path / "cut"
    process = command("train", *arguments, f"--workdir={cut}", check=False)
    while not any(p.name.isdigit() for p in (cut / "checkpoints").glob("*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, err = command("train", *arguments, f"--workdir={cut}")
    assert "resumed at step" in err
    assert lines(cut) == lines(tmp_path / "whole")
    evaluated = [command("evaluate", f"--workdir={tmp_path / n}")[0] for n in ("cut", "whole")]
    assert evaluated[0] == evaluated[1]


def lines_so_far(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(corpus, tmp_path):
    arguments = [
        *TINY,
        f"--config.data.corpus={corpus}",
        "--config.train.steps=100000",
        f"--workdir={tmp_path}",
    ]
    process = command("train", *arguments, check=False)
    while not (tmp_path / "metrics.jsonl").exists() or not lines_so_far(tmp_path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by a signal at step" in err
    step = int(err.split("stopped by a signal at step ")[1].split(";")[0])
    assert (tmp_path / "checkpoints" / str(step)).exists()


BAD = {
    "no config": ([], "--config=FILE.py is missing"),
    "no workdir": (["--config=configs/base.py"], "--workdir=FOLDER is missing"),
    "config file": (["--config=configs/quickstrt.py"], "configs/quickstart.py"),
    "key": (["--config.train.step=3"], "did you mean train.steps"),
    "section": (["--config.trian.steps=3"], "did you mean train.steps"),
    "type": (["--config.train.steps=many"], "config.train.steps"),
    "argument": (["train.steps=3"], "unknown argument 'train.steps=3'"),
    "flag": (["--wrokdir=x"], "workdir"),
    "corpus": (["--config.data.corpus=stdlb"], "stdlib"),
    "tfds corpus": (["--config.data.corpus=tfds:no_such_set"], "tfds:no_such_set"),
    "tokenizer": (["--config.data.tokenizer=byte"], "'bytes'"),
    "weighting": (["--config.objective.weighting=unifrm"], "did you mean 'uniform'"),
    "keep": (
        ["--config.objective.weighting=rho1", "--config.objective.rho1.keep=0.0"],
        "objective.rho1.keep=0.0 must be above 0 and at most 1",
    ),
    "accumulation": (["--config.train.accumulation=3"], "train.accumulation=3"),
    "devices": (["--config.mesh.data=8"], "does not match 1 device"),
    "mesh": (["--config.mesh.tensor=0"], "mesh.tensor=0"),
    "heads": (["--config.model.heads=5"], "model.heads=5"),
    "sequence": (["--config.data.sequence_length=1"], "data.sequence_length=1"),
    "packing": (["--config.data.packing=bestfit"], "did you mean 'best_fit'"),
    "too small": (["--config.train.batch_size=4096"], "data.corpus"),
    "schedule": (["--config.optimizer.schedule=linear"], "optimizer.schedule"),
    "bits": (["--config.quantization.bits=9"], "quantization.bits=9"),
    "from": (
        [
            "--config.quantization.bits=4",
            "--config.quantization.fraction=1",
            "--config.quantization.from=x",
        ],
        "x holds no run",
    ),
    "log_every": (["--config.train.log_every=0"], "train.log_every=0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, corpus, tmp_path):
    arguments, expected = BAD[name]
    full = [*TINY, f"--config.data.corpus={corpus}", f"--workdir={tmp_path}", *arguments]
    if name.startswith("no "):
        full = arguments
    process = command("train", *full, check=False)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    assert expected in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    tiny.rows_mostly_slow(
        [
            ('{"text": "fine"}\n{"text": \n', "corpus.jsonl:2"),
            ('{"text": "fine"}\n{"prompt": "x"}\n', "corpus.jsonl:2"),
            ("", "corpus.jsonl"),
        ],
        (0,),
    ),
)
def test_a_broken_corpus_is_named_with_its_line(text, expected, tmp_path):
    (tmp_path / "corpus.jsonl").write_text(text)
    corpus = f"--config.data.corpus={tmp_path / 'corpus.jsonl'}"
    process = command("train", *TINY, corpus, f"--workdir={tmp_path / 'run'}", check=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert expected in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_fails_is_named_with_its_line(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from configs import base\n\ndef get_config():\n    c = base.get_config()\n"
        "    c.train.step = 3\n    return c\n"
    )
    process = command("train", f"--config={broken}", f"--workdir={tmp_path / 'run'}", check=False)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert f"{broken}:5" in err
    assert 'Did you mean "steps" instead of "step"?' in err
    assert len(err.strip().splitlines()) == 1, err
