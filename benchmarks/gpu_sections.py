"""What benchmarks/gpu.py measures.

python -m benchmarks.gpu_sections SECTION FILE.json --seconds=S [--toy] [--peak=F --bandwidth=B]

One section a process, which benchmarks/gpu.py starts.

B rows, T tokens, N heads, H head width.
"""

import argparse
import functools
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import kernels
from benchmarks.gpu_fp8 import fp8
from benchmarks.gpu_rows import Given, Rows, bound, build, config, measure, step, timed
from benchmarks.gpu_tests import tests
from lm.model.platform import platform
from lm.planning import benchmark, timing
from lm.planning.decoding_benchmark import SEQUENCES
from lm.planning.flops import PEAK_FLOPS
from lm.planning.item import Item

# Changes of the train step that may pay, each beside the step as configured.
_STEPS = {
    "as configured": {},
    "nothing recomputed, loss in blocks of 8,192": {
        "objective.block_size": 8192,
        "model.remat": "none",
    },
    "loss in blocks of 8,192": {"objective.block_size": 8192},
    "attention in XLA": {"model.attention": "einsum"},
}
_BLOCKS = (1024, 2048, 4096, 8192, 16_384, 32_768)


def machine(given: Given) -> Rows:
    """The device and its limits."""

    def device():
        first = jax.devices()[0]
        ask = [
            "nvidia-smi",
            "--format=csv,noheader",
            "--query-gpu=name,driver_version,memory.total",
        ]
        try:
            driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            driver = f"nvidia-smi: {error}"
        return {
            "platform": platform(),
            "kind": first.device_kind,
            "devices": jax.device_count(),
            "capability": getattr(first, "compute_capability", None),
            "client": first.client.platform_version.replace("\n", " "),
            "driver": driver,
            "cores": os.cpu_count(),
            "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        }

    def peaks():
        items = benchmark.machine(["bfloat16"])
        measured = timing.limits(items, timing.measure(items, given.repeats))
        known = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        return {
            "measured_flops": measured.flops["bfloat16"],
            "bandwidth": measured.bandwidth,
            "peak_flops": known or measured.flops["bfloat16"],
            "peak_is": "of the data sheet" if known else "the best product measured here",
        }

    return {"device": device, "peaks": peaks}


def steps(given: Given, shape: str) -> Rows:
    """Train steps of one shape."""

    def row(changes):
        c = config(given, shape)
        c.update_from_flattened_dict(changes)
        return step(given, c)

    return {name: functools.partial(row, changes) for name, changes in _STEPS.items()}


def loss(given: Given) -> Rows:
    """Cross-entropy with its gradients at V 131,072, dense and in blocks."""
    reference = {}

    def row(block):
        c = config(given, "1.3b")
        c.data.vocab_size = 1000 if given.toy else 131_072
        c.train.batch_size = 2 if given.toy else 4  # 8,192 tokens
        c.objective.block_size = block // 128 if given.toy else block
        run = build(c)
        with jax.set_mesh(run.mesh):
            blocked, dense = benchmark.cross_entropy(run)
            found = bound(given, blocked if block else dense)
        if not block:
            reference.update(found)
        for name in ("seconds", "temporary_bytes") if reference else ():
            found[f"{name}_of_dense"] = found[name] / reference[name]
        return found

    rows = {"dense": functools.partial(row, 0)}
    return rows | {f"blocks of {n:,}": functools.partial(row, n) for n in _BLOCKS}


def attention(given: Given) -> Rows:
    """One layer's attention with its gradients: what the model can use, and a kernel that knows
    that the mask is causal, which cannot tell packed documents apart."""
    best = "cudnn" if platform() == "gpu" else "xla"

    def of_model(shape, implementation):
        run = build(config(given, shape, attention=implementation))
        with jax.set_mesh(run.mesh):
            return bound(given, benchmark.attention(run)[0])

    def causal(shape):
        c = config(given, shape)
        b, t, n = c.train.batch_size, c.data.sequence_length, c.model.heads
        h = c.model.width // n
        keys = jax.random.split(jax.random.key(0), 3)
        heads = [jax.random.normal(key, (b, t, n, h), jnp.bfloat16) for key in keys]

        def total(query, key, value):
            out = jax.nn.dot_product_attention(
                query, key, value, is_causal=True, implementation=best
            )
            return (out * query).sum()

        run = functools.partial(jax.jit(jax.grad(total, (0, 1, 2))), *heads)
        formula = "12 B T^2 N H, the whole square"
        item = Item("causal", run, 12 * b * t * t * n * h, 0, formula, "bfloat16", b * t)
        return bound(given, item)

    rows = {}
    for shape in ("350m", "1.3b"):
        for name in dict.fromkeys((best, "xla", "einsum")):
            rows[f"{shape} {name}"] = functools.partial(of_model, shape, name)
        rows[f"{shape} {best}, causal alone"] = functools.partial(causal, shape)
    return rows


def variants(given: Given) -> Rows:
    """The step of six layers of 350m with one thing changed."""
    plain = {}

    def row(name):
        c = config(given, "350m", layers=6, embedding="learned")
        c.train.batch_size = 2 if given.toy else 8
        found = step(given, benchmark.variant(c, name))
        if name == "plain":
            plain.update(found)
        if plain:
            found["seconds_of_plain"] = found["seconds"] / plain["seconds"]
        return found

    return {name: functools.partial(row, name) for name in benchmark.VARIANTS}


def decoding(given: Given) -> Rows:
    """Text drawn by 350m with parameters in bfloat16."""

    def row(implementation, index):
        c = config(given, "350m", attention=implementation, param_dtype="bfloat16")
        run = build(c)
        with jax.set_mesh(run.mesh):
            return timed(given, benchmark.sampling(run)[index])

    return {
        f"{rows} at a time, attention {name}": functools.partial(row, name, index)
        for name in ("auto", "einsum")
        for index, rows in enumerate(SEQUENCES)
    }


def profile(given: Given) -> Rows:
    """The kernels of three steps of 350m."""

    def row():
        run = build(config(given, "350m"))
        with jax.set_mesh(run.mesh), tempfile.TemporaryDirectory() as folder:
            item = benchmark.train_step("step", run)
            jax.block_until_ready(item.run())
            start = time.perf_counter()
            with jax.profiler.trace(folder):
                for _ in range(3):
                    last = item.run()
                jax.block_until_ready(last)
            seconds = time.perf_counter() - start
            found = kernels.summary(next(Path(folder).rglob("*.xplane.pb")))
        return {"steps": 3, "seconds": seconds, **found}

    return {"three steps of 350m": row}


SECTIONS: dict[str, Callable[[Given], Rows]] = {
    "machine": machine,
    "step 350m": functools.partial(steps, shape="350m"),
    "step 1.3b": functools.partial(steps, shape="1.3b"),
    "loss": loss,
    "tests": tests,
    "attention": attention,
    "variants": variants,
    "decoding": decoding,
    "profile": profile,
    "fp8": fp8,
}


def main() -> None:
    """One section, as the command line names it."""
    start = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--peak", type=float, default=math.nan)
    parser.add_argument("--bandwidth", type=float, default=math.nan)
    arguments = parser.parse_args()
    limits = timing.Limits({"bfloat16": arguments.peak}, arguments.bandwidth)
    given = Given(arguments.toy, limits, start + arguments.seconds)
    measure(SECTIONS[arguments.section](given), arguments.path, given.deadline)


if __name__ == "__main__":
    main()
