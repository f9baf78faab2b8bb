"""Every loss is the dense one, with its gradients, and has its published toy values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives.losses import LOSSES, Inputs, Loss, Teacher, logits, loss_statistics
from objectives.losses.overlap import tversky_index
from objectives.losses.tempnet import tempered_loss
from objectives.vocabulary import products

V, D, BLOCK = 41, 6, 16
TOY_Z = jnp.asarray([[[2.0, 1.0, 0.0]]])


def inputs(rows=2, length=5, seed=0, **options) -> Inputs:
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), (rows, length))
    return Inputs(
        jnp.asarray(rng.standard_normal((rows, length, D)), jnp.float32),
        jnp.asarray(rng.standard_normal((D, V)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (rows, length)), jnp.int32),
        block_size=BLOCK,
        keys=keys,
        teacher=Teacher(
            jnp.asarray(rng.standard_normal((rows, length, 3)), jnp.float32),
            jnp.asarray(rng.standard_normal((3, V)), jnp.float32),
            products(),
        ),
        **options,
    )


def of_logits(z, target) -> Inputs:
    """Inputs whose logits are `z` [1, 1, V]: the head is the identity."""
    return Inputs(z, jnp.eye(z.shape[-1]), jnp.full((1, 1), target, jnp.int32), block_size=2)


def value(loss: Loss, x: Inputs, weights=None):
    """The losses of all tokens and their mean, or the reduced loss."""
    weights = jnp.ones(x.targets.shape) if weights is None else weights
    losses = loss_statistics(loss, x, weights).loss
    if loss.reduce is None:
        return jnp.sum(weights * losses), losses
    return loss.reduce(losses, weights), losses


def run(loss: Loss, x: Inputs, weights=None):
    """((value, losses), d value / d (hidden, head, params)), jitted."""

    def f(hidden, head, params):
        return value(loss, x._replace(hidden=hidden, head=head, params=params), weights)

    return jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(x.hidden, x.head, x.params)


def dense_log_p(x: Inputs):
    z = x.hidden @ x.head
    return jax.nn.log_softmax(x.softcap * jnp.tanh(z / x.softcap) if x.softcap else z)


def pick(array_BTV, x: Inputs):
    return jnp.take_along_axis(array_BTV, x.targets[..., None], -1)[..., 0]


def dense_dice(x):
    p = jnp.exp(pick(dense_log_p(x), x))
    q = (1 - p) ** 1.5 * p
    return 1 - (2 * q.sum() + 0.5) / (q.sum() + q.size + 0.5)


def dense_squared_dice(x):
    p = jnp.exp(pick(dense_log_p(x), x))
    return 1 - (2 * p.sum() + 1e-4) / (jnp.sum(p**2) + p.size + 1e-4)


def dense_tversky(x):
    p = jnp.exp(pick(dense_log_p(x), x))
    return 1 - (p.sum() + 1) / (p.sum() + (1 - p).sum() + 1)


def dense_hinge(x):
    p = jnp.exp(dense_log_p(x))
    others = jnp.where(jax.nn.one_hot(x.targets, V) > 0, -1.0, p)
    return jnp.sum(1 + pick(p, x) - others.max(-1))


def dense_rollout(x, temperature, beta):
    log_p = dense_log_p(x)
    drawn = jax.lax.stop_gradient(jax.nn.softmax(log_p / temperature))
    reward = jnp.where(jax.nn.one_hot(x.targets, V) > 0, 1.0, beta)
    return -jnp.sum(drawn * reward * log_p)


def dense_harmonic(x, distance, exponent, epsilon, absolute=False):
    """All distances at once, in an array [B, T, V, D]."""
    a, b = x.hidden[:, :, None], x.head.T
    if distance == "cosine":
        d = 1 - jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
    elif distance == "bray_curtis":
        below = jnp.abs(a) + jnp.abs(b) if absolute else jnp.abs(a + b)
        d = jnp.abs(a - b).sum(-1) / below.sum(-1)
    else:
        s = jnp.exp(x.params["log_precision"]) if distance == "mahalanobis" else 1.0
        d = jnp.sum(s * (a - b) ** 2, -1) / D
    log_p = jax.nn.log_softmax(-exponent * jnp.log(d + epsilon))
    return -jnp.sum(pick(log_p, x))


def dense_tau(x):
    p, z = x.params, jax.lax.stop_gradient(x.hidden @ x.head)
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    h = jax.nn.sigmoid(z @ p["first"] + p["first_bias"]) @ p["second"] + p["second_bias"]
    share = jax.nn.softmax(h / jnp.exp(p["log_scale"])) - 1 / h.shape[-1]
    return 0.5 + 4.5 * jax.nn.sigmoid((share * h) @ p["last"] + p["last_bias"])


def dense_tempnet(x):
    tau = dense_tau(x)
    nll = -pick(jax.nn.log_softmax(x.hidden @ x.head / tau[..., None]), x)
    return jnp.sum(tau * nll + (2.0 - np.log(V)) * tau)


def dense_distillation(x):
    log_q = jax.nn.log_softmax(x.teacher.hidden @ x.teacher.head)
    return jnp.sum(jnp.exp(log_q) * (log_q - dense_log_p(x)))


PRECISION = {"log_precision": jnp.linspace(-1.0, 1.0, D)}
NET = LOSSES["tempnet"](rho=2.0, width=7, dropout=0.0)
CASES = {
    "cross_entropy": (LOSSES["cross_entropy"](), lambda x: -jnp.sum(pick(dense_log_p(x), x)), {}),
    "dice": (LOSSES["dice"](alpha=1.5, smooth=0.5), dense_dice, {}),
    "dice squared": (LOSSES["dice"](squared=True), dense_squared_dice, {}),
    "tversky": (LOSSES["tversky"](), dense_tversky, {}),
    "inverted_hinge": (LOSSES["inverted_hinge"](), dense_hinge, {}),
    "rollout": (
        LOSSES["one_token_rollout"](samples=0, beta=-0.2),
        functools.partial(dense_rollout, temperature=1.0, beta=-0.2),
        {},
    ),
    "hot rollout": (
        LOSSES["one_token_rollout"](samples=0, temperature=1.7, beta=0.3),
        functools.partial(dense_rollout, temperature=1.7, beta=0.3),
        {},
    ),
    "tempnet": (NET, dense_tempnet, NET.init(jax.random.key(3), V, D)),
    "distillation": (LOSSES["block_distillation"](), dense_distillation, {}),
} | {
    f"harmonic {name} {options}": (
        LOSSES["harmonic"](distance=name, exponent=2.5, epsilon=1e-3, **options),
        functools.partial(dense_harmonic, distance=name, exponent=2.5, epsilon=1e-3, **options),
        PRECISION if name == "mahalanobis" else {},
    )
    for name, options in (
        ("euclidean", {}),
        ("cosine", {}),
        ("bray_curtis", {}),
        ("bray_curtis", {"absolute": True}),
        ("mahalanobis", {}),
    )
}


def close(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max() + 1e-9
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_dense_computation(case, softcap):
    loss, dense, params = CASES[case]
    if softcap and not loss.softcapped:
        pytest.skip("its logits are not soft-capped")
    x = inputs(params=params, softcap=softcap)

    def reference(hidden, head, params):
        return dense(x._replace(hidden=hidden, head=head, params=params))

    expected = jax.jit(jax.value_and_grad(reference, (0, 1, 2)))(x.hidden, x.head, x.params)
    (total, _), gradients = run(loss, x)
    close((total, gradients), expected)
    # Negative control: the gradient of another loss is far away.
    if case != "cross_entropy":
        with pytest.raises(AssertionError):
            close(run(Loss(), x)[1][:2], expected[1][:2], 1e-2)
