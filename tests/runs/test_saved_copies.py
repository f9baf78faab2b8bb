"""What the writer of a checkpoint holds on CPU is not what the next step writes to."""

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from lm.runs import checkpoints
from lm.runs.checkpoints import Checkpoints


class Source:
    def get_state(self):
        return {}


def pointers(tree):
    return [
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
    ]


def test_the_arrays_that_are_written_are_copies_with_the_same_sharding(tmp_path, monkeypatch):
    mesh = jax.make_mesh((8,), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    weights = jax.device_put(np.arange(64, dtype=np.float32), split)
    state = {"step": jax.numpy.int32(3), "trained": {"w": weights}, "optimizer": [weights + 1]}
    given, saving = [], checkpoints.ocp.args.StandardSave
    monkeypatch.setattr(
        checkpoints.ocp.args, "StandardSave", lambda part: given.append(part) or saving(part)
    )
    kept = Checkpoints(epath.Path(tmp_path / "checkpoints"), print)
    kept.save(3, state, Source(), {})
    # Written in place while the save is under way, as a train step writes.
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)(state)
    assert not set(pointers(given)) & set(pointers(doubled))
    (saved,) = [part["trained"]["w"] for part in given if "trained" in part]
    assert saved.sharding == split
    kept.wait()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), doubled
    )
    found, _ = kept.restore(abstract)
    kept.close()
    np.testing.assert_array_equal(found["trained"]["w"], np.arange(64))
    assert int(found["step"]) == 3
