"""Quantized matrices in the form of compressed-tensors, "pack-quantized", which vLLM reads.

For a matrix NAME of shape [out, in]: NAME_packed, int32 [out, in / (32 / bits)] with codes from the
lowest bits on, stored as code + 2^(bits - 1); NAME_scale [out, groups]; NAME_shape, int64 [2].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.compression.integer_grids import IntegerGrid
from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.pretrained.families import FAMILIES
from lm.pretrained.huggingface import Entry, entries
from lm.pretrained.safetensors_file import DTYPES

_WIDTHS = (4, 8)


def quantization_config(bits: int, group_size: int) -> dict[str, Any]:
    """What config.json says of the weights; a group size of 0 is one scale a channel."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    if group_size:
        weights |= {"strategy": "group", "group_size": group_size}
    else:
        weights["strategy"] = "channel"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def check(bits: float, grids: Mapping[str, IntegerGrid], dtype: str) -> None:
    """Raises InputError unless the format holds these grids exactly."""
    if bits not in _WIDTHS:
        raise InputError(
            f"--format=compressed_tensors has 4 and 8 bits, and the model {bits:g}; valid: "
            "--bits=4 or --bits=8 of launch.quantize"
        )
    for path, grid in grids.items():
        if grid.minimum_LGO is not None:
            raise InputError(
                f"--format=compressed_tensors is written for symmetric grids, and {path} has "
                "minima; valid: --quantizer=absmax of launch.quantize"
            )
        check_scales(path, grid.scale_LGO, dtype)


def check_scales(path: str, scale: np.ndarray, dtype: str) -> None:
    """Raises InputError unless all scales are numbers of `dtype`, a key of `DTYPES`."""
    if not np.array_equal(scale.astype(DTYPES[dtype]).astype(np.float32), scale):
        name = {"F16": "float16", "BF16": "bfloat16"}.get(dtype, dtype)
        raise InputError(
            f"scales of {path} are no {name} numbers, and rounding would change the weights; "
            f"quantize with --scales={name}"
        )


def packed_entries(
    family: str,
    config: ModelConfig,
    params: Any,
    grids: Mapping[str, IntegerGrid],
    dtype: str,
    bits: int,
) -> list[Entry]:
    """All tensors: those of `grids` packed, the others as floats.

    Raises:
      InputError: the family keeps a quantized matrix in one tensor with others, or as [in, out].
    """
    holders = {}
    for tensor in FAMILIES[family].tensors(config):
        quantized = [path for path in tensor.ours if path in grids]
        if quantized and (len(tensor.ours) > 1 or family == "gpt2"):
            raise InputError(
                f"--format=compressed_tensors: {family} keeps {', '.join(tensor.ours)} in one "
                "tensor or transposed; valid: --format=huggingface"
            )
        for layer in range(config.layers if quantized else 0):
            holders[tensor.theirs.format(layer)] = quantized[0], layer
    found: list[Entry] = []
    for entry in entries(family, config, params, dtype):
        if entry.name not in holders:
            found.append(entry)
            continue
        path, layer = holders[entry.name]
        grid = grids[path]
        shape, groups = entry.shape, grid.scale_LGO.shape[-2]
        found += [
            _entry(
                f"{entry.name}_packed",
                (shape[0], shape[1] * bits // 32),
                "I32",
                lambda grid=grid, layer=layer: pack(grid.codes_LIO[layer].T, bits),
            ),
            _entry(
                f"{entry.name}_scale",
                (shape[0], groups),
                dtype,
                lambda grid=grid, layer=layer: grid.scale_LGO[layer].T,
            ),
            _entry(f"{entry.name}_shape", (2,), "I64", lambda shape=shape: np.array(shape)),
        ]
    return found


def _entry(name, shape, dtype, make) -> Entry:
    return Entry(name, shape, dtype, [make], lambda parts: parts[0])


def pack(codes_OI: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes [O, I] -> int32 [O, I bits / 32]; code k of a word is at its bits k * bits."""
    each = 32 // bits
    if codes_OI.shape[1] % each:
        raise InputError(f"--format=compressed_tensors needs inputs in multiples of {each}")
    stored = (codes_OI.astype(np.int64) + (1 << (bits - 1))).astype(np.uint32)
    stored = stored.reshape(len(stored), -1, each)
    shifts = (np.arange(each) * bits).astype(np.uint32)
    return np.bitwise_or.reduce(stored << shifts, axis=-1).view(np.int32)
