"""A checkpoint of one mesh restored on others: every bit of the state, and the rest of the data."""

import shutil

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from lm.runs.checkpoints import Checkpoints
from lm.training import experiment, loop
from lm.training.logging import read_metrics

SAVED_ON = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
# With everything that a state can hold: moments, scales, an average and what a weighting carries.
FULL = {
    "quantization__bits": 4.0,
    "quantization__fraction": "1",
    "train__ema_decay": 0.9,
    "objective__weighting": "glow",
    "objective__glow__samples": 24,
}
OTHERS = {
    "fsdp=8": (8, {"mesh__data": 1, "mesh__fsdp": 8}),
    "one device": (1, {"mesh__data": 1}),
    "tensor=4": (4, {"mesh__data": 1, "mesh__tensor": 4}),
    "sequence=2, fsdp=2": (4, {"mesh__data": 1, "mesh__fsdp": 2, "mesh__sequence": 2}),
}
STEP = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


def opened(corpus, devices=8, **mesh):
    config = tiny.config(data__corpus=corpus, **FULL, **mesh)
    data = experiment.load_data(config.data)
    run = experiment.build(config, data.tokenizer.vocab_size, jax.devices()[:devices])
    return run, iter(experiment.train_batches(config, data, mesh=run.mesh))


def random_state(run, seed=0):
    """Numbers that no initialisation gives, each leaf where the run has it."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            value = rng.integers(100, size=leaf.shape)
        else:
            value = rng.normal(size=leaf.shape)
        return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, run.abstract_state())


def assert_same_bits(a, b):
    leaves, others = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    for (path, x), (other, y) in zip(leaves, others, strict=True):
        assert path == other
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    """(folder, the state in it, the batches that come next)."""
    folder = epath.Path(tmp_path_factory.mktemp("saved"))
    run, iterator = opened(corpus, **SAVED_ON)
    with jax.set_mesh(run.mesh):
        state = random_state(run)
        for _ in range(STEP):
            next(iterator)
        kept = Checkpoints(folder, print)
        kept.save(STEP, state, iterator, {})
        kept.close()
    following = [next(iterator) for _ in range(6)]
    iterator.close()
    return folder, state, following


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_every_bit_and_the_rest_of_the_data(corpus, saved, other, tmp_path):
    folder, state, following = saved
    devices, mesh = OTHERS[other]
    run, iterator = opened(corpus, devices, **mesh)
    with jax.set_mesh(run.mesh):
        kept = Checkpoints(folder, print, read_only=True)
        found, _ = kept.restore(run.abstract_state(), iterator)
        kept.close()
        assert_same_bits(found, state)
        expected = jax.tree.map(lambda leaf: leaf.sharding, run.abstract_state())
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, found, expected)
        # Back again, from this mesh to the first one.
        kept = Checkpoints(epath.Path(tmp_path), print)
        kept.save(STEP, found, iterator, {})
        kept.close()
    for expected in following:
        jax.tree.map(np.testing.assert_array_equal, next(iterator), expected)
    iterator.close()
    first, iterator = opened(corpus, **SAVED_ON)
    with jax.set_mesh(first.mesh):
        kept = Checkpoints(epath.Path(tmp_path), print, read_only=True)
        again, _ = kept.restore(first.abstract_state(), iterator)
        kept.close()
    assert_same_bits(again, state)
    jax.tree.map(np.testing.assert_array_equal, next(iterator), following[0])
    iterator.close()


@pytest.mark.slow
def test_the_meshes_place_it_differently_and_one_bit_is_seen(corpus, saved):
    """Negative controls of the test above."""
    _, state, following = saved
    for devices, mesh in OTHERS.values():
        run, iterator = opened(corpus, devices, **mesh)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(run.abstract_state()), strict=True)
        assert any(not x.sharding.is_equivalent_to(y.sharding, y.ndim) for x, y in pairs)
        assert not np.array_equal(next(iterator)["tokens"], following[0]["tokens"])
        iterator.close()
    leaves, tree = jax.tree.flatten(state)
    largest = int(np.argmax([leaf.size for leaf in leaves]))
    leaves[largest] = np.nextafter(np.asarray(leaves[largest]), np.float32(np.inf))
    with pytest.raises(AssertionError):
        assert_same_bits(jax.tree.unflatten(tree, leaves), state)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(corpus, tmp_path):
    """Three steps on 2 x 2 x 2, three on fsdp=8, as six on one mesh but for the order of sums."""
    common = FULL | {"data__corpus": corpus, "checkpoint__keep": 3, "train__steps": 6}
    loop.train(tiny.config(**common, **SAVED_ON), str(tmp_path / "whole"), print)
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    (tmp_path / "moved" / "checkpoints" / "6").rename(tmp_path / "put away")
    said = []
    loop.train(
        tiny.config(**common, mesh__data=1, mesh__fsdp=8), str(tmp_path / "moved"), said.append
    )
    assert "resumed at step 3" in said
    losses = [
        [line["loss"] for line in read_metrics(epath.Path(run)) if "loss" in line]
        for run in (tmp_path / "whole", tmp_path / "moved")
    ]
    assert len(losses[0]) == 7  # six steps and the validation
    assert losses[1][:3] == losses[0][:3]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    # Negative control: neighbouring steps differ by far more.
    assert not np.allclose(losses[1][1:6], losses[0][:5], rtol=1e-5)
