"""A loss on a mesh is the loss on one device, and only [B, T] arrays cross the tensor axis."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.parallel import sharded_loss
from lm.parallel.mesh import make_mesh
from lm.planning import ahead
from lm.training import experiment
from lm.training.step import token_keys
from objectives import OBJECTIVES
from objectives.losses import LOSSES, Inputs, Teacher
from objectives.vocabulary import products

ROWS, LENGTH, WIDTH = 4, 6, 8
METHODS = {
    "cross_entropy": {},
    "dice": {"alpha": 0.5},
    "inverted_hinge": {},
    "one_token_rollout": {"samples": 16, "temperature": 1.3},
    "tempnet": {"width": 5, "rho": 1.0, "dropout": 0.0},
    "harmonic": {"distance": "bray_curtis"},
    "block_distillation": {},
    "distillation": {"divergence": "jensen_shannon", "share": 0.7, "temperature": 1.5},
    "nkd": {"temperature": 1.5},
    "pld": {"top": 25},
    "dhkd": {"alpha": 0.1, "alignment": "hidden"},
    "nd": {},
    "dac_kl": {"lower": 0.01, "upper": 0.5},
    "align_distil": {},
    "top_k_distillation": {"share": 0.7},
    "uld": {},
}
# Two tensor devices of which each has 20 of 40 tokens; a width and rows on fsdp.
MESH = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}


def compute(loss, vocab_size=40, rows=ROWS, block_size=7):
    """Statistics, and gradients of a sum of all of them, on the mesh that is set."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    hidden, matrix = 2 * normal(rows, LENGTH, WIDTH), normal(WIDTH, vocab_size)
    targets = jnp.asarray(rng.integers(0, vocab_size, (rows, LENGTH)), jnp.int32)
    weights = jnp.ones((rows, LENGTH)).at[0, 1].set(0.0)
    teachers = {
        name: Teacher(normal(rows, LENGTH, WIDTH), normal(WIDTH, vocab_size), products())
        for name in loss.teachers
    }
    params = loss.init(jax.random.key(1), vocab_size, WIDTH)
    stored = tiny.stored_teacher(rows, LENGTH, vocabulary=vocab_size)

    def total(hidden, matrix, params):
        keys = token_keys(0, jnp.zeros((), jnp.int32), (rows, LENGTH))
        inputs = Inputs(hidden, matrix, targets, params, 0.0, block_size, keys, teachers)
        inputs = inputs._replace(stored={name: stored[name] for name in loss.batch_keys})
        stats = sharded_loss.training_statistics(loss, inputs, weights)
        of_targets = (jnp.where(weights != 0, x, 0.0) for x in stats if x is not None)
        return sum((i + 1) * jnp.sum(x) for i, x in enumerate(of_targets)), stats

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    return run(hidden.at[0, 1].set(jnp.nan), matrix, params)


def close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(y).max() + 1e-9
        np.testing.assert_allclose(np.asarray(x) / scale, np.asarray(y) / scale, atol=tolerance)


@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(
        [*METHODS, "self_knowledge", "ppo"], ("cross_entropy", "distillation", "uld", "ppo")
    ),
)
def test_a_loss_on_a_mesh_is_the_loss_on_one_device(name):
    """Statistics and gradients, a NaN hidden state at a token of weight 0."""
    if name in LOSSES:
        loss = LOSSES[name](**METHODS[name])
    elif name == "ppo":
        # A head that starts at 0 would give the hidden states no gradient.
        loss = OBJECTIVES[name](sampling_temperature=1.7).loss
        loss = loss._replace(init=lambda *_: {"value": jnp.arange(8.0), "value_bias": 0.5})
    else:  # an objective with a loss of its own
        loss = OBJECTIVES[name](mu=0.1, top=25).loss
    (value, stats), gradients = compute(loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))
    with jax.set_mesh(make_mesh(MESH)):
        (spread_value, spread_stats), spread_gradients = compute(loss)
    close((spread_value, spread_gradients), (value, gradients))
    live = np.ones((ROWS, LENGTH), bool)
    live[0, 1] = False
    for got, want in zip(jax.tree.leaves(spread_stats), jax.tree.leaves(stats), strict=True):
        close(np.asarray(got)[live], np.asarray(want)[live])


@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(
        ["cross_entropy", "one_token_rollout", "block_distillation", "uld"], ("cross_entropy",)
    ),
)
def test_plain_differentiation_on_a_mesh_is_that_of_blocks_on_one_device(name):
    loss = LOSSES[name](**METHODS[name])
    expected = compute(loss)
    with jax.set_mesh(make_mesh(MESH)):
        found = compute(loss, block_size=0)
    close((found[0][0], found[1]), (expected[0][0], expected[1]))


@pytest.mark.parametrize(
    "sizes", tiny.mostly_slow([{"vocab_size": 39}, {"rows": 3}], ({"vocab_size": 39},)), ids=str
)
def test_what_does_not_divide_stays_whole(sizes):
    loss = LOSSES["cross_entropy"]()
    expected = compute(loss, **sizes)
    with jax.set_mesh(make_mesh(MESH)):
        found = compute(loss, **sizes)
    close((found[0][0], found[1]), (expected[0][0], expected[1]))


VOCAB, BLOCK, BATCH = 4096, 256, 4


def gathered(**mesh):
    """Results of the all-gathers of a compiled train step, and the text of the program."""
    options = {f"mesh__{axis}": size for axis, size in mesh.items()}
    sizes = {"data__sequence_length": 16, "train__batch_size": BATCH, "model__layers": 1}
    config = tiny.config(objective__block_size=BLOCK, **sizes, **options)
    run = experiment.build(config, VOCAB, jax.devices())
    with jax.set_mesh(run.mesh):
        step = run.train_step().lower(run.abstract_state(), ahead.abstract_batch(run))
        text = step.compile().as_text()
    found = re.findall(r" = \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return [tuple(map(int, dims.split(","))) for dims in found], text


@pytest.mark.slow
def test_no_head_and_no_logits_cross_the_tensor_axis(monkeypatch):
    mesh = {"data": 1, "fsdp": 2, "tensor": 4, "sequence": 1}
    arrays, text = gathered(**mesh)
    # What fsdp has of a device's columns, once.
    assert arrays.count((32, VOCAB // 4)) == 1
    assert not any(VOCAB in dims or BLOCK in dims for dims in arrays)
    # Its gradient, once.
    assert re.findall(r"f32\[16,1024\]\S* reduce-scatter\(", text)

    # Negative control: what XLA makes of the same loss without the mapping.
    monkeypatch.setattr(sharded_loss, "_on_mesh", lambda function, *arrays: function(*arrays))
    arrays, _ = gathered(**mesh)
    assert any(VOCAB in dims or BLOCK in dims for dims in arrays)
