"""Block size 0: the same values and gradients as blocks, in every mode of differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from objectives import losses
from objectives.cross_entropy import token_statistics
from objectives.losses import LOSSES, Inputs
from objectives.losses.base import training_statistics
from objectives.terms import masked_sum
from objectives.vocabulary import products

B, T, D, V = 2, 5, 6, 11
CASES = {
    **{name: {} for name in LOSSES},
    "one_token_rollout": {"samples": 8},
    "one_token_rollout exact": {"samples": 0, "temperature": 1.5},
    "tempnet": {"width": 4, "rho": 1.0},
    **{f"harmonic {d}": {"distance": d} for d in ("cosine", "bray_curtis", "mahalanobis")},
}


def arrays(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    hidden = jax.random.normal(keys[0], (B, T, D))
    head = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return hidden, head, targets, (jax.random.normal(keys[3], (B, T, D)), 0.5 * head[::-1])


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("softcap", tiny.mostly_slow([0.0, 3.0], (3.0,)))
def test_all_statistics_in_every_mode(softcap):
    hidden, head, targets, direction = arrays()
    mix = jnp.cos(jnp.arange(3 * B * T).reshape(3, B, T))

    def value(block_size, hidden, head):
        found = token_statistics(hidden, head, targets, softcap=softcap, block_size=block_size)
        return jnp.sum(mix * jnp.stack(found[:3]))

    def dense(hidden, head):
        z = hidden @ head
        z = softcap * jnp.tanh(z / softcap) if softcap else z
        log_p = jax.nn.log_softmax(z)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return jnp.sum(mix * jnp.stack([nll, jax.nn.logsumexp(z, -1), entropy]))

    def everything(f):
        gradient = jax.grad(f, (0, 1))
        primals = (hidden, head)
        forward = jax.jvp(f, primals, direction)
        forward_over_reverse = jax.jvp(gradient, primals, direction)[1]
        reverse_over_reverse = jax.grad(lambda p: dot(gradient(*p), direction))(primals)
        return forward, gradient(*primals), forward_over_reverse, reverse_over_reverse

    ours = jax.jit(lambda: everything(lambda *p: value(0, *p)))()
    expected = jax.jit(lambda: everything(dense))()
    for got, want in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    blocks = jax.jit(jax.value_and_grad(lambda *p: value(4, *p), (0, 1)))(hidden, head)
    for got, want in zip(jax.tree.leaves(blocks[1]), jax.tree.leaves(ours[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda *p: value(4, *p), (hidden, head), direction)


@pytest.mark.parametrize(
    "name", tiny.mostly_slow(CASES, ("cross_entropy", "tempnet", "harmonic", "distillation", "uld"))
)
def test_every_loss_is_that_of_blocks_and_has_a_forward_mode(name):
    hidden, head, targets, direction = arrays(1)
    loss = LOSSES[name.split()[0]](**CASES[name])
    keys = jax.random.split(jax.random.key(2), (B, T)) if loss.random else None
    params = loss.init(jax.random.key(3), V, D)
    teachers = {
        name: losses.Teacher(hidden + 0.3 + i, head, products())
        for i, name in enumerate(loss.teachers)
    }
    weights = jnp.ones((B, T)).at[0, 1].set(0)
    stored = tiny.stored_teacher(B, T, vocabulary=V)
    stored = {name: stored[name] for name in loss.batch_keys}

    def value(block_size, hidden, head):
        inputs = Inputs(hidden, head, targets, params, 0.0, block_size, keys, teachers)
        inputs = inputs._replace(stored=stored)
        return masked_sum(weights, training_statistics(loss, inputs, weights).loss)

    def plain(hidden, head):
        gradient = jax.grad(lambda *p: value(0, *p), (0, 1))
        of_value = jax.jvp(lambda *p: value(0, *p), (hidden, head), direction)
        return *of_value, gradient(hidden, head), jax.jvp(gradient, (hidden, head), direction)[1]

    expected, slopes = jax.jit(jax.value_and_grad(lambda *p: value(4, *p), (0, 1)))(hidden, head)
    found, forward, gradient, product = jax.jit(plain)(hidden, head)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for got, want in zip(gradient, slopes, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(forward, dot(slopes, direction), rtol=1e-3, atol=1e-4)
    assert all(np.isfinite(x).all() and np.any(x) for x in product)
    if name in ("cross_entropy", "block_distillation"):  # no part of the gradient is detached
        step = 1e-3
        ends = [
            jax.jit(plain)(hidden + s * direction[0], head + s * direction[1])[2]
            for s in (-step, step)
        ]
        for got, low, high in zip(product, *ends, strict=True):
            np.testing.assert_allclose(got, (high - low) / (2 * step), rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("name", ["cross_entropy", "one_token_rollout exact", "block_distillation"])
@pytest.mark.parametrize("broken", tiny.mostly_slow(["hidden", "head"], ("hidden",)))
def test_a_token_without_weight_passes_exactly_nothing(name, broken):
    """Also where a weighting, and not the data, has taken its weight."""
    hidden, head, targets, _ = arrays(2)
    loss = LOSSES[name.split()[0]](**CASES[name])
    teachers = {name: losses.Teacher(hidden, head, products()) for name in loss.teachers}
    weights = jnp.ones((B, T)).at[0, 2].set(0)
    bad_hidden = hidden.at[0, 2].set(jnp.nan if broken == "hidden" else 0)
    bad_head = head.at[1, 3].set(jnp.inf) if broken == "head" else head
    weights = jnp.zeros((B, T)) if broken == "head" else weights

    def value(hidden, head):
        inputs = Inputs(hidden, head, targets, (), 0.0, 0, None, teachers)
        found = training_statistics(loss, inputs, jnp.ones((B, T)))
        return masked_sum(weights, found.loss), found.loss

    slopes, of_tokens = jax.jit(jax.grad(value, (0, 1), has_aux=True))(bad_hidden, bad_head)
    assert np.isnan(of_tokens[0, 2])  # what has no finite logits is not hidden
    assert np.isnan(of_tokens).sum() == (B * T if broken == "head" else 1)
    np.testing.assert_array_equal(slopes[0][0, 2], 0)
    if broken == "head":
        assert not any(map(np.any, slopes))
    else:
        without = jax.jit(jax.grad(value, (0, 1), has_aux=True))(hidden.at[0, 2].set(0), head)[0]
        np.testing.assert_allclose(slopes[1], without[1], rtol=1e-6)
