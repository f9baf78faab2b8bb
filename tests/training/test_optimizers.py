import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from lm.compression.phases import Phases
from lm.errors import InputError
from lm.model.parameters import parameter_kinds
from lm.model.trained import Trained
from lm.training.optimizers import _clip_by_global_norm, make_optimizer
from lm.training.schedules import make_schedule


def optimizer(params, steps=10, **overrides):
    c = tiny.config(**{f"optimizer__{k}": v for k, v in overrides.items()})
    return make_optimizer(c, Phases(steps, steps), Trained(params))[0]


def params_and_grads():
    params = tiny.params(tiny.model())
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    grads = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return params, jax.tree.unflatten(tree, grads)


def update(tx, params, grads, steps=1):
    params, grads = Trained(params), Trained(grads)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return updates.params


def test_every_parameter_has_a_group_and_a_stranger_is_an_error():
    params, _ = params_and_grads()
    groups = parameter_kinds(params)
    assert set(jax.tree.leaves(groups)) == {"matrix", "embedding", "head", "vector"}
    assert groups["layers"]["mlp_norm"]["scale"] == "vector"
    params["layers"]["mlp"]["router"] = jnp.zeros((2, 32, 4))
    with pytest.raises(InputError, match="layers/mlp/router"):
        parameter_kinds(params)


def test_muon_of_stacked_layers_is_muon_of_each_layer():
    params, grads = params_and_grads()
    ours = update(optimizer(params, name="muon", warmup_steps=0, clip_norm=0.0), params, grads)
    matrix = params["layers"]["mlp"]["up"]
    each = optax.contrib.muon(2e-3, beta=0.95, weight_decay=0.1)
    for layer in range(len(matrix)):
        one = {"w": matrix[layer]}
        expected = update(each, one, {"w": grads["layers"]["mlp"]["up"][layer]})["w"]
        np.testing.assert_allclose(ours["layers"]["mlp"]["up"][layer], expected, atol=1e-6)
    # Negative control: an update near the sign of the gradient would be Adam's.
    signs = np.sign(grads["layers"]["mlp"]["up"])
    assert np.abs(np.corrcoef(signs.ravel(), ours["layers"]["mlp"]["up"].ravel())[0, 1]) < 0.95


@pytest.mark.parametrize("name", tiny.mostly_slow(["adamw", "lion", "muon"], ("muon",)))
def test_weight_decay_spares_vectors_only(name):
    params, _ = params_and_grads()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = update(optimizer(params, name=name, warmup_steps=0), params, zeros)
    decayed = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    expected = jax.tree.map(lambda group: group != "vector", parameter_kinds(params))
    assert decayed == expected
    np.testing.assert_allclose(
        updates["head"]["kernel"], -2e-3 * 0.1 * params["head"]["kernel"], rtol=1e-5
    )


def test_clipping_is_by_global_norm():
    params, grads = params_and_grads()
    huge = jax.tree.map(lambda g: 1e6 * g, grads)
    options = {"name": "adamw", "warmup_steps": 0}
    states = []
    for g in (grads, huge):
        tx = optimizer(params, clip_norm=1.0, **options)
        trained = Trained(params)
        states.append(jax.jit(tx.update)(Trained(g), tx.init(trained), trained)[1])
    for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("share", tiny.mostly_slow([0.0, 0.5, 1.0, 2.0, 1e6], (0.0, 0.5)))
def test_clipping_is_that_of_optax(share):
    _, grads = params_and_grads()
    limit = 3.0
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g: g * (share * limit / norm), grads)
    ours, theirs = (
        make(limit).update(grads, optax.EmptyState())[0]
        for make in (_clip_by_global_norm, optax.clip_by_global_norm)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)
    np.testing.assert_allclose(optax.tree.norm(ours), limit * min(share, 1.0), rtol=1e-5)


def rates(steps=100, **overrides):
    c = tiny.config(**{f"optimizer__{k}": v for k, v in overrides.items()}).optimizer
    schedule = make_schedule(c, steps, 1.0)
    return np.array([schedule(i) for i in range(steps + 1)])


def test_schedules():
    for name in ("cosine", "wsd", "constant"):
        values = rates(schedule=name, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
        np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-5)
        assert (values > 0).all()
    cosine = rates(schedule="cosine", warmup_steps=0, final_fraction=0.1)
    np.testing.assert_allclose(cosine[[0, 50, 100]], [1, 0.55, 0.1], atol=1e-6)
    for shape, middle in (("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - np.sqrt(0.5))):
        options = {"warmup_steps": 5, "decay_fraction": 0.2, "final_fraction": 0.0}
        wsd = rates(schedule="wsd", decay_shape=shape, **options)
        assert (wsd[5:81] == 1).all()
        np.testing.assert_allclose(wsd[[90, 100]], [middle, 0], atol=1e-6)
        assert (np.diff(wsd[80:]) < 0).all()


@pytest.mark.parametrize(
    ("overrides", "names"),
    tiny.rows_mostly_slow(
        [
            ({"name": "adam"}, "did you mean 'adamw'"),
            ({"schedule": "cosin"}, "did you mean 'cosine'"),
            ({"peak_learning_rate": 0.0}, "optimizer.peak_learning_rate"),
            ({"beta2": 1.0}, "optimizer.beta2"),
            ({"warmup_steps": 10}, "optimizer.warmup_steps=10"),
            (
                {"schedule": "wsd", "decay_fraction": 1.0, "warmup_steps": 3},
                "begins before the end",
            ),
            ({"final_fraction": 2.0}, "optimizer.final_fraction"),
            ({"clip_norm": -1.0}, "optimizer.clip_norm"),
        ],
        (0, 3, 4),
    ),
)
def test_refuses(overrides, names):
    with pytest.raises(InputError, match=names):
        optimizer(params_and_grads()[0], **overrides)


@pytest.mark.parametrize("name", tiny.mostly_slow(["adamw", "lion", "muon"], ("muon",)))
def test_the_step_of_a_scale_is_a_share_of_it(name):
    """Whatever its gradient is, times scale_rate; with relative_scale_steps off it is not.

    The steps of weights do not depend on either key.
    """
    params, grads = params_and_grads()
    scales = {"head": {"kernel": jnp.asarray([[0.01, 0.04, 2.0]])}}
    slopes = {"head": {"kernel": jnp.asarray([[3.0, -1e-3, 5.0]])}}
    trained, g = Trained(params, scales), Trained(grads, slopes)
    shares, of_weights = {}, []
    for relative, rate in ((True, 1.0), (False, 1.0), (True, 50.0), (False, 50.0)):
        c = tiny.config(optimizer__name=name, optimizer__warmup_steps=0, optimizer__clip_norm=0.0)
        c.quantization.update(relative_scale_steps=relative, scale_rate=rate)
        tx, _ = make_optimizer(c, Phases(10, 10), trained)
        updates, _ = jax.jit(tx.update)(g, tx.init(trained), trained)
        shares[relative, rate] = updates.scales["head"]["kernel"] / scales["head"]["kernel"]
        of_weights.append(jax.tree.leaves(updates.params))
    np.testing.assert_allclose(shares[True, 1.0], [[-2e-3, 2e-3, -2e-3]], rtol=1e-4)
    assert abs(shares[False, 1.0]).max() > 10 * 2e-3
    for relative in (True, False):
        np.testing.assert_allclose(shares[relative, 50.0], 50 * shares[relative, 1.0], rtol=1e-6)
    for leaves in of_weights[1:]:
        jax.tree.map(np.testing.assert_array_equal, leaves, of_weights[0])
