"""Rotation, AWQ and Outlier Suppression+ of a sharded model are those of the whole one."""

import jax
import numpy as np
import pytest
import tiny

from lm.compression.awq import apply_awq, search_awq
from lm.compression.outlier_suppression import (
    apply_outlier_suppression,
    search_outlier_suppression,
)
from lm.compression.phases import default_rules
from lm.compression.rotation import rotate_model
from lm.parallel.mesh import put_batch
from lm.training import experiment
from objectives.quantization import activation_quantizer, minmax

RULES = default_rules(4, minmax)
MODEL = {"tied_head": True, "kv_heads": 4, "activation": "swiglu"}
BATCHES = [tiny.batch(8, 16, seed) for seed in range(2)]


def changed(model, params, batches):
    """By name, what each of the three makes of the parameters, and what they search."""
    awq = search_awq(model, params, batches, RULES, tokens=64)
    suppression = search_outlier_suppression(
        model, params, batches, RULES, activation_quantizer(8), tokens=64, most_steps=3
    )
    return {
        "rotation": rotate_model(model, params, 0)[1],
        "awq": apply_awq(model, params, awq, RULES),
        "suppression": apply_outlier_suppression(model, params, suppression)[1],
        "losses": (awq.losses, [one.first_loss for one in suppression.values()]),
    }


@pytest.mark.slow
def test_equals_one_device():
    c = tiny.config(mesh__fsdp=2, mesh__tensor=2, mesh__data=2, data__sequence_length=16)
    c.model.update(MODEL)
    run = experiment.build(c, tiny.VOCAB, jax.devices())
    with jax.set_mesh(run.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
        state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
        params = state.trained.params
        got = changed(run.model, params, [put_batch(run.mesh, batch) for batch in BATCHES])
    for name in ("rotation", "awq"):
        up = got[name]["layers"]["mlp"]["up"]
        assert up.sharding.is_equivalent_to(params["layers"]["mlp"]["up"].sharding, up.ndim)
    want = changed(tiny.model(**MODEL), jax.device_get(params), BATCHES)
    # Where two candidates are as good, the order of sums decides: losses and the rotation are sure.
    # A number halfway between two levels may be rounded either way and move a loss by a percent.
    for name, tolerance in (("losses", 2e-2), ("rotation", 1e-5)):
        for a, b in zip(*map(jax.tree.leaves, (got[name], want[name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-6)
    assert jax.tree.structure(got) == jax.tree.structure(want)
