"""Schedules that go on, and what is said of a change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.compression.phases import Phases
from lm.errors import InputError
from lm.training.schedules import describe_change, make_phase_schedule, make_schedule

PEAK = 2e-3


def config(steps, **optimizer):
    return tiny.config(train__steps=steps, **{f"optimizer__{k}": v for k, v in optimizer.items()})


def rates(c):
    schedule = make_schedule(c.optimizer, c.train.steps, PEAK)
    return np.asarray(jax.vmap(schedule)(jnp.arange(c.train.steps)))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_an_extension_goes_on_from_the_last_learning_rate(schedule):
    options = {"schedule": schedule, "decay_shape": "linear", "final_fraction": 0.1}
    old = rates(config(20, **options))
    new = rates(config(50, extended_from=(20,), **options))
    np.testing.assert_array_equal(new[:20], old)
    last = old[-1]
    np.testing.assert_allclose(new[20], last, rtol=1e-6)
    if schedule == "constant":
        np.testing.assert_allclose(new[20:], last, rtol=1e-6)
    else:
        assert (np.diff(new[20:]) < 0).all()
        u = np.arange(30) / 30
        shape = 1 - u if schedule == "wsd" else (1 + np.cos(np.pi * u)) / 2
        np.testing.assert_allclose(new[20:], last * (0.1 + 0.9 * shape), rtol=1e-5)
        # Negative control: the schedule of 50 steps has the old run's last step far above.
        assert rates(config(50, **options))[19] > 2 * last
    # Once more: all before is as it was.
    twice = rates(config(60, extended_from=(20, 50), **options))
    np.testing.assert_array_equal(twice[:50], new)
    np.testing.assert_allclose(twice[50], new[-1], rtol=1e-6)


@pytest.mark.parametrize("value", [(0,), (30,), (40,), (20, 10), (10, 10), (-1,)])
def test_refuses_extensions_that_fit_no_run(value):
    with pytest.raises(InputError, match=r"optimizer\.extended_from=.* below train\.steps=30"):
        rates(config(30, extended_from=value))


def test_refuses_extensions_of_two_phases():
    c = config(30, extended_from=(10,), schedule="wsd")
    with pytest.raises(InputError, match=r"extended_from=.*quantized from step 15"):
        make_phase_schedule(c, Phases(30, 15), PEAK)


def test_a_change_is_said_with_the_learning_rates_around_it():
    old, new = config(20).to_dict(), config(50)
    line = describe_change(old, new, 1000, 20)
    assert "train.steps 20 -> 50" in line
    before, after = rates(config(20))[19], rates(new)[20]
    assert f"last step was {before:.3g}, that of the next is {after:.3g}" in line
    assert "optimizer.extended_from=(20,) continues" in line
    # Taken at its word: nothing jumps, and nothing more is advised.
    line = describe_change(old, config(50, extended_from=(20,)), 1000, 20)
    assert f"last step was {before:.3g}, that of the next is {before:.3g}" in line
    assert "optimizer.extended_from () -> (20,)" in line
    assert "continues" not in line
    # Of a run of two extensions, and of a record without the key.
    line = describe_change(config(50, extended_from=(20,)).to_dict(), config(90), 1000, 50)
    assert "optimizer.extended_from=(20, 50) continues" in line
    del old["optimizer"]["extended_from"]
    assert "train.steps" in describe_change(old, new, 1000, 20)


def test_nothing_is_said_where_nothing_changes():
    c = config(20)
    listed = c.to_dict()
    listed["optimizer"]["extended_from"] = []  # as JSON gives it back
    assert describe_change(listed, c, 1000, 10) == ""
    assert describe_change({}, c, 1000, 10) == ""
    assert describe_change(c.to_dict(), config(30), 1000, 0) == ""
    line = describe_change(c.to_dict(), config(20, weight_decay=0.2), 1000, 10)
    assert line.startswith("changed: optimizer.weight_decay 0.1 -> 0.2; the learning rate")
