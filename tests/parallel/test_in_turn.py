"""Independent programs with collectives, in a process of its own: XLA aborts one that hangs."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lm.parallel.in_turn import in_turn

rows = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
w = jax.device_put(jnp.ones((256, 256)), rows)
inputs = [jax.device_put(jnp.ones((64, 256)) * i, rows) for i in range(8)]

@jax.jit
def product(x):
    for _ in range(4):
        x = jnp.tanh(x @ w / 256)
    return x.T @ x

for _ in range(int(sys.argv[1])):
    sum(in_turn(map(product, inputs)))
print("done")
"""


@pytest.mark.slow
def test_independent_programs_do_not_wait_for_each_other():
    """Without `in_turn` this hung in three of three runs, within 20 rounds of eight programs."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, "60"],
        env={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr[-2000:]
