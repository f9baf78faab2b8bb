"""A disk that takes no more: what is written is whole, and the error says so.

The kernel refuses to let a file grow beyond RLIMIT_FSIZE, for any user and in any container.
"""

import contextlib
import json
import resource

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from lm.errors import InputError, StorageError, writing
from lm.runs import integrity
from lm.runs.checkpoints import Checkpoints
from lm.training import loop
from lm.training.logging import Writer

# TensorStore tells a loop that Orbax has closed of each further read or write that fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextlib.contextmanager
def no_file_above(length):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state(step):
    return {"step": jnp.int32(step), "w": jax.random.normal(jax.random.key(step), (64, 64))}


def test_a_save_that_fails_is_reported_and_the_one_before_it_stays(tmp_path):
    folder = epath.Path(tmp_path) / "checkpoints"
    iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
    kept = Checkpoints(folder, print)
    kept.save(1, state(1), iterator, {})
    while kept._manager.is_saving_in_progress():
        pass
    kept.check()
    with no_file_above(8192):
        kept.save(2, state(2), iterator, {})
        while kept._manager.is_saving_in_progress():
            pass
        with pytest.raises(StorageError, match=r"checkpoints/2 cannot be written: File too large"):
            kept.check()
    kept.close()
    assert [path.name for path in folder.iterdir() if path.name.isdigit()] == ["1"]
    assert integrity.damage(folder / "1") == ""
    again = Checkpoints(folder, print)
    restored, _ = again.restore(jax.eval_shape(state, 0))
    np.testing.assert_array_equal(restored["w"], state(1)["w"])
    again.save(2, state(2), iterator, {})
    again.close()
    assert integrity.damage(folder / "2") == ""


def test_a_failure_of_the_last_save_is_reported_by_close(tmp_path):
    iterator = iter(grain.MapDataset.range(100).to_iter_dataset())
    kept = Checkpoints(epath.Path(tmp_path) / "checkpoints", print)
    with no_file_above(8192):
        kept.save(1, state(1), iterator, {})
        with pytest.raises(StorageError, match="File too large"):
            kept.close()


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path):
    writer = Writer(epath.Path(tmp_path), tiny.config(), 0)
    writer.write(1, "train", {"loss": 1.5})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (
        no_file_above(len(before) + 10),
        pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: File too large"),
    ):
        writer.write(2, "train", {"loss": 1.25})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    writer.write(2, "train", {"loss": 1.25})
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]


def test_a_full_disk_ends_the_event_file_too(tmp_path):
    """Rather than leave the run waiting for a writer that has died."""
    writer = Writer(epath.Path(tmp_path), tiny.config(train__tensorboard=True), 0)

    def write_on():
        for step in range(1, 2000):
            (tmp_path / "metrics.jsonl").write_text("")
            writer.write(0, "train", {"loss": float(step)})

    full = rf"^{tmp_path} cannot be written: File too large"
    with no_file_above(4096), pytest.raises(StorageError, match=full):
        write_on()


def test_the_event_file_holds_what_was_written(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    writer = Writer(epath.Path(tmp_path), tiny.config(train__tensorboard=True), 3)
    writer.write(4, "train", {"loss": 1.5, "name": "x"})
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents*")
    content, events = path.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    version, purge, train = events
    assert version.file_version == "brain.Event:2"
    assert (purge.step, purge.session_log.status) == (4, SessionLog.START)
    assert (train.step, train.summary.value[0].tag) == (4, "train/loss")
    assert [value.simple_value for value in train.summary.value] == [1.5]


def test_a_folder_that_cannot_be_written_is_refused_before_the_start(tmp_path):
    corpus = tiny.write_corpus(tmp_path / "corpus")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--workdir=.*/file/run cannot be written: Not a dir"):
        loop.train(tiny.config(data__corpus=corpus), str(tmp_path / "file" / "run"), print)
    with no_file_above(100), pytest.raises(InputError, match="cannot be written: File too large"):
        loop.train(tiny.config(data__corpus=corpus), str(tmp_path / "run"), print)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("content", ["", '{"config": ', "[]", "{}"])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"run/config\.json is damaged"):
        loop.check_workdir(epath.Path(tmp_path / "run"), {})


def test_other_errors_are_not_taken_for_those_of_a_disk():
    with pytest.raises(ValueError, match="shapes differ"), writing("x"):
        raise ValueError("shapes differ")
