"""The kernel for TPUs, run as JAX operations, against plain attention; and who gets it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.errors import InputError
from lm.model import attention, splash
from lm.parallel.mesh import RULES, make_mesh
from lm.training import experiment


def arrays(batch=4, heads=4, kv_heads=2, length=256, width=64):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(batch, heads, length, width))
    k, v = (rng.normal(size=(batch, kv_heads, length, width)) for _ in range(2))
    segments = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
    return *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(segments, jnp.int32)


def test_the_kernel_on_a_mesh_equals_plain_attention_and_so_do_its_gradients():
    q, k, v, segments = arrays()

    def total(attend, q, k, v, segments):
        out = attend(q, k, v, segments)
        return jnp.sum(out * jnp.cos(out)), out

    def kernel(q, k, v, segments):
        with nn.logical_axis_rules(RULES):
            return splash.splash_attention(q, k, v, segments, interpret=True)

    def plain(q, k, v, segments):
        return attention.attend(q, k, v, segments, segments, implementation="einsum")

    def both(attend, segments=segments):
        function = jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True)
        return jax.tree.leaves(jax.jit(function, static_argnums=0)(attend, q, k, v, segments))

    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}, jax.devices())
    with jax.set_mesh(mesh):
        found = both(kernel)
    for ours, expected in zip(found[1:], both(plain)[1:], strict=True):
        np.testing.assert_allclose(ours, expected, atol=5e-5)
    # Negative control: with the segments of another row the result is another one.
    others = both(plain, segments[::-1])
    assert np.abs(np.asarray(found[1]) - others[1]).max() > 0.1


SIZES = {"length": 256, "heads": 8, "kv_heads": 4, "head_width": 64, "mesh": {}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ""),
        ({"head_width": 128, "mesh": {"data": 2, "fsdp": 4, "tensor": 4, "sequence": 1}}, ""),
        ({"length": 200}, "data.sequence_length=200"),
        ({"head_width": 32}, "= 32 is not"),
        ({"mesh": {"sequence": 2}}, "mesh.sequence=2"),
        ({"mesh": {"tensor": 8}}, "model.kv_heads=4 is not divisible by mesh.tensor=8"),
    ],
)
def test_sizes_that_the_kernel_cannot_have_are_named(change, expected):
    reason = splash.refusal(**(SIZES | change))
    assert (expected in reason) if expected else reason == ""


def test_a_config_that_cannot_have_it_is_refused_before_anything_is_compiled():
    c = tiny.config(model__width=256, data__sequence_length=128, model__attention="splash")
    experiment.build(c, tiny.VOCAB, 1)  # a plan, for no device in particular
    with pytest.raises(InputError, match="runs on TPUs only"):
        experiment.build(c, tiny.VOCAB, jax.devices()[:1])
    c.data.sequence_length = 100
    with pytest.raises(InputError, match=r"splash: data\.sequence_length=100"):
        experiment.build(c, tiny.VOCAB, 1)


def test_explicit_splash_refuses_blocks_and_gives_decoding_to_einsum():
    q, k, v, segments = arrays(length=128)
    with pytest.raises(InputError, match="no blocks"):
        attention.attend(q, k, v, segments, segments, blocks_BT=segments, implementation="splash")
    row = (q[:, :, 5:6], k, v, segments[:, 5:6], segments)
    out = attention.attend(*row, offset=5, implementation="splash")
    np.testing.assert_allclose(out, attention.attend(*row, offset=5, implementation="einsum"))


def test_auto_is_of_the_devices_of_the_mesh():
    q, k, *_ = arrays(length=128)
    assert attention._best(q, k, True, False) == "einsum"
