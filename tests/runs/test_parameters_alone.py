"""Restoring parameters alone reads no moments from the disk, not even to check them."""

import jax
import numpy as np
import pytest
from etils import epath
from test_damage import files, flip

from lm.errors import InputError
from lm.runs import checkpoints, integrity
from lm.runs.checkpoints import Checkpoints

SIZE = 1 << 18  # numbers of one array; random ones are hardly compressed


def state():
    keys = jax.random.split(jax.random.key(0), 3)
    weights, first, second = (jax.random.normal(key, (SIZE,)) for key in keys)
    return {"step": jax.numpy.int32(7), "trained": {"w": weights}, "optimizer": [first, second]}


class Source:
    def get_state(self):
        return {}


def save(folder):
    kept = Checkpoints(epath.Path(folder), print)
    kept.save(7, state(), Source(), {})
    kept.close()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "checkpoints")


@pytest.fixture
def joined(tmp_path, monkeypatch):
    """A checkpoint as older commits wrote it: the moments among all the others."""
    monkeypatch.setattr(checkpoints, "_APART", ())
    return save(tmp_path / "checkpoints")


def restore(folder, fields):
    """(state, bytes that this process has read meanwhile)."""
    kept = Checkpoints(epath.Path(folder), print, read_only=True)
    before = _read_bytes()
    found, _ = kept.restore(jax.eval_shape(state), fields=fields)
    after = _read_bytes()
    kept.close()
    return found, after - before


def _read_bytes():
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["rchar"])


def test_parameters_are_read_twice_and_the_moments_never(saved):
    """Once for the checksums, once for the numbers."""
    found, count = restore(saved, ("trained",))
    np.testing.assert_array_equal(found["trained"]["w"], state()["trained"]["w"])
    assert found["optimizer"] is None
    assert 4 * SIZE < count < 2.1 * 4 * SIZE
    # Negative control: all of it is three times as much.
    whole, count = restore(saved, None)
    assert count > 3 * 1.6 * 4 * SIZE
    jax.tree.map(np.testing.assert_array_equal, whole, state())


def test_checkpoints_of_older_commits_are_read_and_checked_whole(joined):
    assert not (joined / "7" / "optimizer").exists()
    found, count = restore(joined, ("trained",))
    np.testing.assert_array_equal(found["trained"]["w"], state()["trained"]["w"])
    assert count > 3.5 * 4 * SIZE
    jax.tree.map(np.testing.assert_array_equal, restore(joined, None)[0], state())


def test_damaged_moments_matter_to_those_who_read_them(tmp_path):
    folder = save(tmp_path / "checkpoints")
    path = max(files(folder / "7" / "optimizer"), key=lambda path: path.stat().st_size)
    flip(path, np.random.default_rng(0))
    assert restore(folder, ("trained",))[0]["optimizer"] is None
    with pytest.raises(InputError, match="none of the checkpoints"):
        restore(folder, None)
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes, not" in integrity.damage(epath.Path(folder / "7"), unread=("optimizer",))
