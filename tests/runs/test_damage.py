"""Checkpoints that the disk has damaged: each is found, named and passed over."""

import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from lm.errors import InputError
from lm.runs import integrity
from lm.runs.checkpoints import Checkpoints

# TensorStore tells a loop that Orbax has closed of each further read or write that fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = (2, 4, 6)


def state(step):
    key = jax.random.key(step)
    return {"step": jnp.int32(step), "w": jax.random.normal(key, (64, 64)), "m": jnp.ones((8, 3))}


def positions():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of three steps; of step 4 the validation loss is the lowest."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    kept = Checkpoints(epath.Path(folder), print, keep=3)
    iterator = positions()
    for step in STEPS:
        next(iterator)
        kept.save(step, state(step), iterator, {"training_seconds": 1.5}, abs(step - 4.0))
    kept.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, *, read_only=True, abstract=None, **options):
    """(state, metadata, position in the data) as bytes and JSON, and what was said."""
    said, iterator = [], positions()
    kept = Checkpoints(epath.Path(folder), said.append, read_only=read_only)
    try:
        found = kept.restore(abstract or jax.eval_shape(state, 0), iterator, **options)
    finally:
        kept.close()
    if found is None:
        return None, said
    return (jax.tree.map(lambda x: np.asarray(x).tobytes(), found[0]), found[1], next(iterator)), (
        said
    )


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder):
    """The file with most of the numbers."""
    return max(files(folder / "state" / "ocdbt.process_0"), key=lambda path: path.stat().st_size)


def flip(path, rng):
    """Flips one bit; returns the content before."""
    before = path.read_bytes()
    after, at = bytearray(before), rng.integers(len(before))
    after[at] ^= 1 << rng.integers(8)
    path.write_bytes(after)
    return before


@pytest.mark.parametrize("seed", tiny.mostly_slow(range(3), (0,)))
def test_a_flipped_bit_is_found_or_changes_nothing(copied, seed):
    """At random places of every file; restoring is needed only where nothing was found."""
    rng = np.random.default_rng(seed)
    folder = copied / "6"
    for each in ("2", "4"):
        shutil.rmtree(copied / each)
    expected, _ = restore(copied)
    harmless = set()
    for path in files(folder):
        for _ in range(20):
            before = flip(path, rng)
            if not integrity.damage(epath.Path(folder)) and path.name not in harmless:
                harmless.add(path.name)
                assert restore(copied)[0] == expected, path
            path.write_bytes(before)
    assert harmless <= {"_CHECKPOINT_METADATA", "commit_success.txt", integrity.RECORD}


def test_without_the_record_a_flipped_bit_restores_as_another_number(copied):
    """Negative control, and why there is a record: Orbax does not notice."""
    folder, wrong = copied / "6", 0
    expected, _ = restore(copied)
    (folder / integrity.RECORD).unlink()
    path = largest(folder)
    for seed in range(8):
        before = flip(path, np.random.default_rng(seed))
        found, said = restore(copied)
        wrong += said == [] and found != expected
        path.write_bytes(before)
    assert wrong


@pytest.mark.parametrize("harm", ["missing", "truncated", "longer"])
def test_every_file_is_missed(copied, harm):
    folder = copied / "6"
    later = {folder / "_CHECKPOINT_METADATA", folder / "commit_success.txt"}
    for path in files(folder):
        before = path.read_bytes()
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes(before[: len(before) // 2] if harm == "truncated" else before + b"\0")
        found = integrity.damage(epath.Path(folder))
        if path in later:
            assert found == ""
            assert restore(copied)[0][0]["step"] == np.int32(6).tobytes()
        elif path.name == integrity.RECORD:
            assert found == {"missing": None, "truncated": f"{path.name} is damaged"}.get(
                harm, found
            )
            assert harm == "missing" or found
        else:
            name = str(path.relative_to(folder))
            assert found.startswith(f"{name} is missing" if harm == "missing" else f"{name} has ")
        path.write_bytes(before)
    assert integrity.damage(epath.Path(folder)) == ""


def test_the_newest_two_are_passed_over_and_moved_aside(copied):
    flip(
        max(files(copied / "6" / "state"), key=lambda p: p.stat().st_size), np.random.default_rng()
    )
    shutil.rmtree(copied / "4")
    (copied / "4").mkdir()
    (found, _, position), said = restore(copied, read_only=False)
    assert found["step"] == np.int32(2).tobytes()
    assert position == 1  # What the iterator gives after the element 0.
    assert [line.partition(",")[0] for line in said] == [
        "passed over checkpoint 6",
        "passed over checkpoint 4",
    ]
    assert "has another checksum than when it was written" in said[0]
    assert said[1].endswith("it is empty")
    names = sorted(path.name for path in copied.iterdir())
    assert [name.rpartition("_")[0] or name for name in names] == [
        "2",
        "unreadable_4",
        "unreadable_6",
    ]
    # The steps can be saved again.
    kept = Checkpoints(epath.Path(copied), print, keep=3)
    kept.save(4, state(4), positions(), {})
    kept.close()
    assert restore(copied)[0][0]["step"] == np.int32(4).tobytes()


def test_when_all_are_damaged_nothing_is_touched(copied):
    for step in STEPS:
        flip(copied / str(step) / "data" / "process_0-of-1.json", np.random.default_rng(step))
    before = {path: path.read_bytes() for path in files(copied)}
    with pytest.raises(InputError, match=r"none of the checkpoints \[6, 4, 2\] can be read"):
        restore(copied, read_only=False)
    assert {path: path.read_bytes() for path in files(copied)} == before


def test_an_intact_checkpoint_that_does_not_fit_is_not_taken_for_a_damaged_one(copied):
    other = jax.eval_shape(state, 0) | {"w": jax.ShapeDtypeStruct((3, 3), jnp.float32), "x": 1}
    with pytest.raises(InputError, match=r"/6 is intact, and cannot be restored: "):
        restore(copied, read_only=False, abstract=other)
    assert sorted(path.name for path in copied.iterdir()) == ["2", "4", "6"]


def test_a_checkpoint_of_an_older_version_has_no_record_and_is_taken(copied):
    for step in STEPS:
        (copied / str(step) / integrity.RECORD).unlink()
    found, said = restore(copied)
    assert found[0]["step"] == np.int32(6).tobytes()
    assert said == []
    (copied / "6" / "state" / "manifest.ocdbt").unlink()
    found, (line,) = restore(copied)
    assert found[0]["step"] == np.int32(4).tobytes()
    assert line.startswith("passed over checkpoint 6, which cannot be read: ")


def test_parts_of_several_processes_cover_all_files(copied):
    folder = epath.Path(copied / "6")
    for path in files(copied / "6" / "state"):
        before = flip(path, np.random.default_rng(1))
        found = [integrity.damage(folder, part, 3) for part in range(3)]
        assert len([problem for problem in found if problem]) == 1, path
        path.write_bytes(before)


def test_the_best_of_an_earlier_start_is_kept(copied):
    kept = Checkpoints(epath.Path(copied), print, keep=1, keep_best=1)
    for step in (8, 10):
        kept.save(step, state(step), positions(), {}, 3.0)
    kept.close()
    assert sorted(int(path.name) for path in copied.iterdir()) == [4, 10]
