"""State keeps the dtypes of its plan: moments and averages are float32, whatever the parameters."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath

from lm.planning.plan import make_plan
from lm.runs.checkpoints import Checkpoints
from lm.training import experiment
from lm.training.state import average_as_model
from lm.training.step import make_train_step

OPTIONS = {
    "model__param_dtype": "bfloat16",
    "model__layers": 1,
    "data__sequence_length": 16,
    "train__ema_decay": 0.99,
    "optimizer__warmup_steps": 0,
}


@pytest.fixture(scope="module")
def run():
    return experiment.build(tiny.config(**OPTIONS), tiny.VOCAB, jax.devices()[:1])


@pytest.fixture(scope="module")
def steps(run):
    """The states after 0 to 3 steps, and the jitted step."""
    with jax.set_mesh(run.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
        state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
        step, states = run.train_step(), [jax.device_get(state)]
        for seed in range(3):
            state, _ = step(state, tiny.batch(8, 16, seed))
            states.append(jax.device_get(state))
    return states, step


def dtypes(tree):
    return {
        (jax.tree_util.keystr(p), x.dtype) for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_the_state_is_as_planned_and_a_step_is_compiled_once(run, steps):
    states, step = steps
    planned = run.abstract_state()
    for state in states:
        assert dtypes(state) == dtypes(planned)
    assert step._cache_size() <= 1  # 0: put out of a full cache of the whole process
    assert {x.dtype for x in jax.tree.leaves(planned.trained.params)} == {jnp.bfloat16.dtype}
    floats = [
        x.dtype
        for x in jax.tree.leaves((planned.optimizer, planned.ema))
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert set(floats) == {jnp.float32.dtype}
    plan, last = make_plan(run), states[-1]
    for name, part in (("optimizer", last.optimizer), ("ema", last.ema), ("state", last)):
        assert plan.bytes[name].total == sum(x.nbytes for x in jax.tree.leaves(part)), name


def test_the_average_moves_and_is_read_in_the_dtype_of_the_model(run, steps):
    first, last = steps[0][0], steps[0][-1]
    pairs = zip(*(jax.tree.leaves(s.ema.params) for s in (first, last)), strict=True)
    moved = [(a != b).mean() for a, b in pairs]
    assert np.mean(moved) > 0.8
    # In bfloat16 a hundredth of a step is rounded away: what a fault would look like.
    for average, parameter in zip(
        *(jax.tree.leaves(x.params) for x in (last.ema, last.trained)), strict=True
    ):
        assert np.abs(average - np.float32(parameter)).max() < 0.02
    read = average_as_model(run.model, last.ema)
    assert dtypes(read.params) == dtypes(last.trained.params)
    with jax.set_mesh(run.mesh):
        usable, quantized = run.usable(last)
    assert dtypes(usable.params) == dtypes(last.trained.params)
    assert not quantized


def test_an_update_is_rounded_once(run, steps):
    """Moments, decay and update in float32, and one rounding of the sum to bfloat16."""
    state = steps[0][2]
    grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), state.trained)
    updates, _ = jax.jit(run.optimizer.update)(grads, state.optimizer, state.trained)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.float32.dtype}
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), state.trained)
    expected = jax.tree.map(lambda p, u: (p + u).astype(jnp.bfloat16), wide, updates)
    found = optax.apply_updates(state.trained, updates)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_restored_run_goes_on_with_the_same_second_step(run, steps, tmp_path):
    (_, first, second, _), step = steps
    source = iter(grain.MapDataset.range(4).to_iter_dataset())
    written = Checkpoints(epath.Path(tmp_path), print)
    with jax.set_mesh(run.mesh):
        placed = jax.tree.map(
            lambda x, s: jax.device_put(x, s.sharding), first, run.abstract_state()
        )
        written.save(1, placed, source, {})
        written.close()
        read = Checkpoints(epath.Path(tmp_path), print, read_only=True)
        restored, _ = read.restore(run.abstract_state(), source)
        read.close()
        state, _ = step(restored, tiny.batch(8, 16, seed=1))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), second)
    assert step._cache_size() <= 1  # 0: put out of a full cache of the whole process


def test_a_step_that_changes_a_dtype_is_an_error(run):
    """AdamW as it is: its moments begin in bfloat16 and become float32."""
    bare = optax.adamw(1e-3)
    step = make_train_step(run.model, bare, lambda _: 1e-3, run.objective, run.config)
    state = run.abstract_state()
    state = state._replace(optimizer=jax.eval_shape(bare.init, state.trained))
    with pytest.raises(TypeError, match=r"float32.* of state\.optimizer.*bfloat16"):
        jax.eval_shape(step, state, tiny.batch(8, 16))
