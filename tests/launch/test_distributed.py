"""Several real processes on this machine, over gloo: what one does alone, what ends them."""

import re
import signal
import time

import jax
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from processes import finish, lines, losses, saved, start, train, wait_for_step

from launch import distributed
from lm.data import corpora
from lm.errors import InputError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """One process with two devices, of two streams."""
    workdir = tmp_path_factory.mktemp("alone")
    train(workdir, corpus, 1, "--config.data.streams=2", devices=2)
    return workdir


@pytest.fixture(scope="module")
def together(corpus, tmp_path_factory):
    """Two processes with a device each, and what they have printed."""
    workdir = tmp_path_factory.mktemp("together")
    return workdir, train(workdir, corpus, 2)


@pytest.mark.slow
def test_two_processes_do_what_one_does(alone, together):
    """Same streams, so same batches; sums over devices may be in another order."""
    np.testing.assert_allclose(losses(together[0])[:20], losses(alone)[:20], rtol=1e-5)
    found = losses(together[0], "validation")
    np.testing.assert_allclose(found, losses(alone, "validation"), rtol=1e-3)
    assert len(found) == 2


@pytest.mark.slow
def test_other_streams_are_other_batches(corpus, alone, tmp_path):
    """Negative control of the test above."""
    train(tmp_path, corpus, 1, "--config.train.steps=20", devices=2)
    assert not np.allclose(losses(tmp_path)[5:20], losses(alone)[5:20], rtol=1e-5)


@pytest.mark.slow
def test_only_one_of_them_speaks_and_writes(together):
    workdir, ((_, out, err), (_, other_out, other_err)) = together
    assert "step 150/150" in err
    assert "next: python -m launch.generate" in out
    assert [line for line in other_out.splitlines() if "[Gloo]" not in line] == []
    assert other_err == ""
    assert [line["step"] for line in lines(workdir, "train")] == list(range(1, 151))
    assert (workdir / "samples" / "step_150.txt").exists()
    assert (workdir / "curves.png").exists()


COUNTED = """
import sys
from lm.data import batches
encode = batches._encode
def counted(numbered, **options):
    with open(sys.argv[0], "a") as file:
        file.write(numbered[1].name + "\\n")
    return encode(numbered, **options)
batches._encode = counted
sys.argv[0] = sys.argv.pop(1)
from launch import command, train
command.run(train.main)
"""


@pytest.mark.slow
def test_no_process_reads_the_documents_of_another(corpus, tmp_path):
    scripts = [["-c", COUNTED, str(tmp_path / f"read{i}")] for i in range(2)]
    arguments = ["--config.train.steps=60", "--config.evaluation.every_steps=0"]
    ended = finish(start(tmp_path / "run", corpus, 2, *arguments, scripts=scripts))
    assert [code for code, *_ in ended] == [0, 0], ended
    (split,) = corpora.load(corpus, "train", directory="", validation_fraction=0.3)
    training = {document.name for document in split.documents}
    first, second = (
        set((tmp_path / f"read{i}").read_text().splitlines()) & training for i in range(2)
    )
    assert first & second == set()
    assert first | second == training
    assert len(first) == len(second)
    # Negative control: both have read all that is for validation, as evaluation needs.
    both = [set((tmp_path / f"read{i}").read_text().splitlines()) - training for i in range(2)]
    assert both[0] == both[1] != set()


@pytest.mark.slow
def test_a_signal_to_one_stops_all_with_one_save_and_they_go_on_bit_for_bit(
    corpus, together, tmp_path
):
    started = start(tmp_path, corpus, 2, "--stopped_code=75", "--config.checkpoint.every_steps=0")
    wait_for_step(tmp_path, 3, started)
    started[1].send_signal(signal.SIGTERM)
    (first, _, err), (second, _, _) = finish(started)
    assert (first, second) == (75, 75), err
    (step,) = saved(tmp_path)
    assert f"stopped by a signal at step {step};" in err
    assert 3 <= step < 150
    (_, _, err), _ = train(tmp_path, corpus, 2, "--config.checkpoint.every_steps=0")
    assert f"resumed at step {step}" in err
    assert lines(tmp_path, "train") == lines(together[0], "train")
    assert lines(tmp_path, "validation") == lines(together[0], "validation")


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_one_process_can_go_on(corpus, together, tmp_path):
    started = start(tmp_path, corpus, 2)
    wait_for_step(tmp_path, 12, started)
    started[1].kill()
    killed = time.time()
    ((code, _, err),) = finish(started[:1], timeout=120)
    started[1].communicate()
    assert code not in (0, 2)
    assert time.time() - killed < 60  # Heartbeats of 10 s, on a machine that may be busy.
    assert "lost the others" in err or "another task died" in err
    train(tmp_path, corpus, 1, devices=2)  # The streams are those of the run, not one a process.
    found, expected = losses(tmp_path), losses(together[0])
    assert len(found) == 150
    np.testing.assert_allclose(found[:30], expected[:30], rtol=1e-5)


@pytest.mark.parametrize("present", tiny.mostly_slow([0, 1], (1,)))
def test_missing_peers_end_in_a_line(corpus, tmp_path, present):
    late = "--config.distributed.join_seconds=2"
    ((code, _, err),) = finish(start(tmp_path / "run", corpus, 2, late, only=[present]))
    assert code == 1
    assert err.startswith("error: not all processes came within distributed.join_seconds=2.")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "tensor", "sequence"])
def test_any_axis_may_span_the_processes(corpus, tmp_path, axis):
    """Quantized, with a moving average and samples: no part of the loop needs all of an array."""
    arguments = [
        "--config.mesh.data=1",
        f"--config.mesh.{axis}=2",
        "--config.train.steps=16",
        "--config.train.ema_decay=0.9",
        "--config.quantization.bits=4",
        "--config.quantization.fraction=0.5",
        "--config.quantization.fused_cooldown=False",
        "--config.quantization.warmup_steps=2",
        "--config.checkpoint.every_steps=0",
        "--config.checkpoint.every_minutes=0.001",
    ]
    streams = "--config.data.streams=2" if axis == "fsdp" else "--config.data.streams=1"
    train(tmp_path / "alone", corpus, 1, *arguments, streams, devices=2)
    train(tmp_path / "together", corpus, 2, *arguments)
    for kind in ("train", "validation"):
        expected = losses(tmp_path / "alone", kind)
        np.testing.assert_allclose(losses(tmp_path / "together", kind), expected, rtol=1e-5)
    assert saved(tmp_path / "together")[-1] == 16


@pytest.mark.parametrize(
    ("arguments", "changes", "expected"),
    [
        (["--coordinator=here", "--processes=2", "--process_id=0"], {}, "here is not HOST:PORT"),
        (["--coordinator=h:1", "--processes=2"], {}, "needs --processes=N and --process_id=I"),
        (["--coordinator=h:1", "--processes=2", "--process_id=2"], {}, "must be from 0 to 1"),
        (["--processes=2"], {}, "need --coordinator=HOST:PORT"),
        (["--processes=1"], {"processes": 4}, "distributed.processes=4, and there are 1"),
        (["--processes=1"], {"join_seconds": 0}, "distributed.join_seconds=0 must be at least 1"),
    ],
)
def test_bad_flags_are_refused(arguments, changes, expected):
    c = tiny.config().distributed
    c.update(changes)
    with flagsaver.flagsaver():
        flags.FLAGS(["launch.train", *arguments])
        with pytest.raises(InputError, match=re.escape(expected)):
            distributed.join(c)
        flags.FLAGS.unparse_flags()


def test_a_process_alone_is_no_cluster(monkeypatch):
    """Without flags and without a cluster, JAX's own detection finds none and nothing changes."""
    monkeypatch.setattr(jax.distributed, "initialize", _as_on_a_laptop)
    flags.FLAGS(["launch.train"])
    distributed.join(tiny.config().distributed)
    flags.FLAGS.unparse_flags()
    assert jax.process_count() == 1


def _as_on_a_laptop(**options):
    assert options["heartbeat_timeout_seconds"] == 100
    raise ValueError("coordinator_address should be defined.")


def test_slurm_is_detected(corpus, tmp_path, monkeypatch):
    """Under srun JAX reads the process count, and the peers that never come are missed."""
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    ((code, _, err),) = finish(
        start(tmp_path / "run", corpus, 1, "--config.distributed.join_seconds=2")
    )
    assert code == 1
    assert err.startswith("error: not all processes came within")
