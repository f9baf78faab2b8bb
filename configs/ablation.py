"""The form of an ablation: a base config, its variants and its seeds, as data for launch.ablate.

Command: python -m launch.ablate --config=configs/ablations/FILE.py --workdir=DIR

A variant is a name and the keys that it changes: {"swiglu": {"model.activation": "swiglu"}}. A name
in braces stands for the work directory of another variant with the same seed: {"quantization.from":
"{full}"} begins with the full-precision phase of the variant `full`, which is trained first. A
variant with the keys `quantize.run`, `quantize.bits` and any other flag of launch.quantize is no
training but that run, quantized after it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

Variants = Mapping[str, Mapping[str, Any]]


def make(
    base: ConfigDict,
    variants: Variants,
    *,
    seeds: Sequence[int],
    baseline: str,
    match: str = "tokens",
    shared: Variants | None = None,
) -> ConfigDict:
    """The config of an ablation.

    Args:
      base: what all variants share, from `get_config()` of another file.
      variants: name -> key with dots -> value; see `grid`, `zipped` and `chain`.
      seeds: values of train.seed; every variant is run with each.
      baseline: the variant that the others are compared with.
      match: `tokens`, `flops` or `time`: in what all variants get as much as the baseline, by
        their train.steps; `none`: each its own train.steps.
      shared: runs that variants need, in the form of variants, but that are not compared.
    """
    config = ConfigDict(convert_dict=False)  # A ConfigDict has no keys with dots.
    config.base = base
    config.variants = dict(variants)
    config.shared = dict(shared or {})
    config.seeds = tuple(seeds)
    config.baseline = baseline
    config.match = match
    config.confidence = 0.95  # of all intervals of the report together
    return config.lock()


def grid(keys: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any] | None = None) -> Variants:
    """Every combination of the values of several keys, `fixed` in all of them.

    grid({"a.x": [1, 2], "b.y": [3, 4]}) has the variants "x=1,y=3", "x=1,y=4", "x=2,y=3" and
    "x=2,y=4".
    """
    return _named(keys, itertools.product(*keys.values()), fixed)


def zipped(keys: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any] | None = None) -> Variants:
    """The first values of all keys, the second ones, and so on, `fixed` in all of them.

    zipped({"a.x": [1, 2], "b.y": [3, 4]}) has the variants "x=1,y=3" and "x=2,y=4".

    Raises:
      ValueError: lists of different lengths.
    """
    return _named(keys, zip(*keys.values(), strict=True), fixed)


def chain(*groups: Variants) -> Variants:
    """All variants of all groups.

    Raises:
      ValueError: two have the same name.
    """
    names = [name for group in groups for name in group]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two variants have the name {min(twice)!r}")
    return {name: keys for group in groups for name, keys in group.items()}


def _named(keys, combinations, fixed) -> Variants:
    short = [key.split(".")[-1] for key in keys]
    return {
        ",".join(f"{name}={value}" for name, value in zip(short, values, strict=True)): {
            **(fixed or {}),
            **dict(zip(keys, values, strict=True)),
        }
        for values in combinations
    }
