"""Products with operands of eight bits against bfloat16, as a figure: training does not use them.

M tokens, K inputs and F outputs of a matrix.
"""

import functools
import re

import jax
import jax.numpy as jnp

from benchmarks.gpu_rows import Given, Rows, config
from lm.planning import timing
from lm.planning.item import Item


def fp8(given: Given) -> Rows:
    """Forward products of 1.3b with operands of float8_e4m3fn against bfloat16."""
    kind, out = jnp.float8_e4m3fn, jnp.bfloat16
    largest = float(jnp.finfo(kind).max)

    def product(x_MK, w_KF):
        return jax.lax.dot(x_MK, w_KF, preferred_element_type=out)

    def scaled(x):
        scale = jnp.max(jnp.abs(x)).astype(jnp.float32) / largest
        return (x / scale).astype(kind), scale

    def with_casts(x_MK, w_KF):
        (x_MK, a), (w_KF, b) = scaled(x_MK), scaled(w_KF)
        return (product(x_MK, w_KF) * (a * b)).astype(out)

    def row(m, k, f):
        x_MK, w_KF = (
            jax.random.normal(jax.random.key(i), s, out) for i, s in enumerate([(m, k), (k, f)])
        )
        small = tuple(jax.jit(scaled)(x)[0] for x in (x_MK, w_KF))
        runs = {
            "bfloat16": (product, (x_MK, w_KF)),
            "fp8": (product, small),
            "fp8_with_casts": (with_casts, (x_MK, w_KF)),
        }
        items, found = [], {}
        for name, (function, arrays) in runs.items():
            compiled = jax.jit(function).lower(*arrays).compile()
            targets = re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())
            found[f"{name}_calls"] = sorted(set(targets))
            run = functools.partial(compiled, *arrays)
            items.append(Item(name, run, 2 * m * k * f, 0, "2 M K F"))
        exact, rounded = (items[i].run().astype(jnp.float32) for i in (0, 2))
        found["relative_error"] = float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact))
        for name, seconds in timing.measure(items, given.repeats).items():
            found[f"{name}_seconds"] = sorted(seconds)[len(seconds) // 2]
        for name in ("fp8", "fp8_with_casts"):
            found[f"{name}_of_bfloat16"] = found[f"{name}_seconds"] / found["bfloat16_seconds"]
        return found

    c = config(given, "1.3b")
    m, d = c.train.batch_size * c.data.sequence_length, c.model.width
    up, v = c.model.mlp_width, c.data.vocab_size
    matrices = {"attention": (d, d), "mlp up": (d, up), "mlp down": (up, d), "head": (d, v)}
    return {
        f"{name} {m} x {k} x {f}": functools.partial(row, m, k, f)
        for name, (k, f) in matrices.items()
    }
