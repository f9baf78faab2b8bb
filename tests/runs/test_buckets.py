"""gs:// without Google: a file system of fsspec that knows files only whole, as buckets do."""

import json
import os

import fsspec
import pytest
import tiny
from etils import epath
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from lm.data import corpora
from lm.errors import InputError
from lm.runs import integrity, run_record
from lm.runs.checkpoints import saved_steps, unfinished
from lm.training import loop
from lm.training.logging import Writer, plot_curves, read_metrics


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that holds what is in gs://."""
    root = tmp_path / "google"
    root.mkdir()

    class Bucket(DirFileSystem):
        protocol = "gcs"
        cachable = False

        def __init__(self, **options):
            assert options == {"finalize_on_close": True}  # As gcsfs takes it.
            super().__init__(path=str(root), fs=LocalFileSystem(auto_mkdir=True))

        def _join(self, path):
            if isinstance(path, str | os.PathLike):
                path = os.fspath(path).removeprefix("gs://")
            return super()._join(path)

        def open(self, path, mode="rb", **options):
            assert "a" not in mode, "no file of a bucket grows"
            return super().open(path, mode=mode, **options)

    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield root
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_metrics_in_a_bucket_are_written_whole_and_resumed(bucket):
    workdir = epath.Path("gs://bucket/run")
    workdir.mkdir(parents=True, exist_ok=True)
    config = tiny.config(train__tensorboard=True)
    first = Writer(workdir, config, 0)
    for step in (1, 2, 3):
        first.write(step, "train", {"loss": 1.0 / step})
    assert read_metrics(workdir) == []  # Not a request a line.
    first.flush()
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3]
    first.write(4, "train", {"loss": 0.2})
    first.close()
    again = Writer(workdir, config, 2)  # Goes on from the checkpoint of step 2.
    again.write(3, "train", {"loss": 0.3})
    again.close()
    assert [line["loss"] for line in read_metrics(workdir)] == [1.0, 0.5, 0.3]
    assert plot_curves(workdir) == workdir / "curves.png"
    found = {path.name for path in (bucket / "bucket" / "run").iterdir()}
    assert found == {"metrics.jsonl", "curves.png"}


def test_a_record_in_a_bucket_is_read_and_compared(bucket):
    workdir = epath.Path("gs://bucket/run")
    assert not run_record.is_run(str(workdir))
    assert loop.check_workdir(workdir, {"config": {}}) == {}
    folder = bucket / "bucket" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = tiny.config().to_dict()
    record = {"config": config, "vocab_size": 257, "tokenizer": "bytes", "weighting_state": "()"}
    (folder / "config.json").write_text(json.dumps(record))
    assert run_record.read(str(workdir), "--workdir").vocab_size == 257
    other = json.loads(json.dumps(record))
    other["config"]["model"]["width"] = 64
    with pytest.raises(InputError, match=r"gs://bucket/run holds checkpoints with model\.width=32"):
        loop.check_workdir(workdir, other)


def test_files_of_a_checkpoint_in_a_bucket_are_known_by_their_lengths(bucket):
    """To checksum them, process 0 would have to download what all processes have uploaded."""
    folder = epath.Path("gs://bucket/run/checkpoints/6")
    local = bucket / "bucket/run/checkpoints/6"
    (local / "state" / "d").mkdir(parents=True)
    for name in ("state/d/a", "state/d/b", "commit_success.txt"):
        (local / name).write_bytes(b"0123456789")
    assert integrity.damage(folder) is None
    integrity.write_record(folder)
    assert integrity.damage(folder) == ""
    assert json.loads((local / integrity.RECORD).read_text())["state/d/b"] == [10, None]
    (local / "state/d/b").write_bytes(b"0123")
    assert integrity.damage(folder) == "state/d/b has 4 bytes, not 10"
    (local / "state/d/b").unlink()
    assert integrity.damage(folder) == "state/d/b is missing"
    # Without its last file a checkpoint is one whose save was cut short.
    directory = epath.Path("gs://bucket/run/checkpoints")
    assert saved_steps(directory) == [6]
    (local / "commit_success.txt").unlink()
    assert saved_steps(directory) == []
    assert unfinished(directory) == [folder]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_corpus_in_a_bucket_is_that_of_a_copy(bucket, tmp_path, kind):
    local = tiny.write_corpus(tmp_path / "text")
    if kind == "file":
        texts = [p.read_text() for p in sorted((tmp_path / "text").iterdir())]
        local = str(tmp_path / "text.jsonl")
        (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    name = os.path.basename(local)
    (bucket / "data").mkdir()
    os.rename(local, bucket / "data" / name)
    (far,) = corpora.load(f"gs://data/{name}", "train", directory="", validation_fraction=0.3)
    os.rename(bucket / "data" / name, local)
    (near,) = corpora.load(local, "train", directory="", validation_fraction=0.3)
    assert [d.spans for d in far.documents] == [d.spans for d in near.documents]
    assert far.fingerprint == near.fingerprint
    # The copy is there, and nothing else is left of making it.
    corpora.load(f"gs://data/{name}", "validation", directory="", validation_fraction=0.3)
    assert [p.name for p in (tmp_path / "cache/nibble/buckets/gs/data").iterdir()] == [name]


def test_what_is_not_in_the_bucket_is_refused(bucket):
    with pytest.raises(InputError, match=r"'gs://data/none\.jsonl': does not exist"):
        corpora.load("gs://data/none.jsonl", "train", directory="", validation_fraction=0.3)
    with pytest.raises(InputError, match=r"data\.directory='gs://data' must be a local folder"):
        corpora.load("stdlib", "train", directory="gs://data", validation_fraction=0.3)
