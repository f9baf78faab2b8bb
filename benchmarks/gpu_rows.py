"""The rows of a section of benchmarks/gpu.py: measured in turn, each failing for itself alone."""

import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from configs.benchmark import get_config
from lm import strict_json
from lm.planning import benchmark, timing
from lm.planning.item import Item
from lm.planning.plan import as_dict
from lm.training import experiment

# Name -> what measures it.
Rows = dict[str, Callable[[], dict[str, Any]]]


class Given(NamedTuple):
    """What a section gets to know: sizes, limits of the device and its time.

    Attributes:
      toy: sizes for CPU.
      limits: FLOP/s of products and bytes/s of memory; NaN where unknown.
      deadline: of the section, by time.monotonic().
    """

    toy: bool
    limits: timing.Limits
    deadline: float

    @property
    def repeats(self) -> int:
        """Timings of each row."""
        return 2 if self.toy else 10


def config(given: Given, shape: str, **model: Any) -> ConfigDict:
    """A shape of configs/benchmark.py with keys of `model` replaced; a toy of it for CPU."""
    c = get_config(shape)
    c.model.update(model)
    if given.toy:
        c.model.update(layers=1, width=32, heads=2, kv_heads=2, mlp_width=64)
        c.data.update(vocab_size=300, sequence_length=32)
        c.train.batch_size = 2
    return c


def build(c: ConfigDict) -> experiment.Experiment:
    """The functions of a config, on the first device alone."""
    return experiment.build(c, c.data.vocab_size, jax.devices()[:1])


def memory(compiled: Any) -> dict[str, Any]:
    """Bytes of a compiled program, and the most that this process has held on the device."""
    found = compiled.memory_analysis()
    held = jax.devices()[0].memory_stats() or {}
    return {
        "temporary_bytes": found.temp_size_in_bytes,
        "argument_bytes": found.argument_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
        "process_peak_bytes": held.get("peak_bytes_in_use"),
    }


def timed(given: Given, item: Item) -> dict[str, Any]:
    """Median, quartiles and fraction of the limit of one item."""
    seconds = timing.measure([item], given.repeats)[item.name]
    return as_dict(timing.figure(item, seconds, given.limits))


def step(given: Given, c: ConfigDict) -> dict[str, Any]:
    """The train step of a config: compilation, memory, time and model FLOPs utilisation."""
    run = build(c)
    with jax.set_mesh(run.mesh):
        made = benchmark.inputs(run)
        start = time.perf_counter()
        compiled = made[0].lower(*made[1:]).compile()
        seconds = time.perf_counter() - start
        item = benchmark.train_step("step", run, (compiled, *made[1:]))
        del made
        first = float(item.run()["loss"])
        found = timed(given, item)
        last = float(item.run()["loss"])
    return {
        **found,
        "mfu": found["fraction"],
        "compile_seconds": seconds,
        **memory(compiled),
        "cudnn_calls": compiled.as_text().count('custom_call_target="__cudnn$fmha'),
        "first_loss": first,
        "last_loss": last,
    }


def bound(given: Given, item: Item) -> dict[str, Any]:
    """An item that is a jitted function with its arguments: its time, and its memory."""
    start = time.perf_counter()
    compiled = item.run.func.lower(*item.run.args).compile()
    seconds = time.perf_counter() - start
    run = functools.partial(compiled, *item.run.args)
    return {**timed(given, item._replace(run=run)), "compile_seconds": seconds, **memory(compiled)}


def measure(rows: Rows, path: Path, deadline: float) -> None:
    """Measures the rows in turn, and writes all that is known after each.

    Args:
      rows: of a section.
      path: the JSON file.
      deadline: by time.monotonic(); a row that would end later, did it take as long as the longest
        before it, is left out.
    """
    found, longest = {}, 0.0
    for name, row in rows.items():
        start = time.monotonic()
        if start + longest > deadline:
            found[name] = {"left_out": "no time was left"}
        else:
            try:
                found[name] = row()
            except Exception as error:  # whatever it is, the other rows go on
                found[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
            gc.collect()  # what the row had on the device
        seconds = time.monotonic() - start
        longest = max(longest, seconds)
        found[name]["row_seconds"] = seconds
        part = path.with_name(f"{path.name}.part")
        part.write_text(strict_json.dumps(found))
        part.replace(path)
