"""A model as a GGUF file for llama.cpp: floats, or quantized with the model's own codes.

O outputs, I inputs. Blocks are of 32 weights of a row (Q4_0, Q4_1, Q8_0) or of 256
(TQ2_0).
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.compression.integer_grids import IntegerGrid
from lm.data.tokenizers import Subwords
from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.pretrained import gguf_names
from lm.pretrained.compressed_tensors import check_scales
from lm.pretrained.families import FAMILIES
from lm.pretrained.gguf_file import gguf_rows
from lm.pretrained.gguf_tokenizer import pre_of
from lm.pretrained.huggingface import entries

_FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# What general.file_type says of the type of most tensors.
_FILE_TYPES = {
    **{"F32": 0, "F16": 1, "BF16": 32},
    **{"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "TQ2_0": 37},
}
_CONTROL, _NORMAL, _USER = 3, 1, 4


def write_gguf(
    output: str,
    family: str,
    config: ModelConfig,
    params: Any,
    tokenizer: Subwords,
    dtype: str,
    grids: Mapping[str, IntegerGrid],
) -> int:
    """Writes a file whole or not at all.

    Args:
      output: the file.
      family: model_type of the model.
      config: its architecture.
      params: its parameters, quantized ones decoded.
      tokenizer: of its text, byte-level byte pairs.
      dtype: of the matrices that are not quantized; vectors are F32.
      grids: path of a quantized matrix -> its codes.

    Returns:
      Bytes of the file.

    Raises:
      InputError: no such family in this format, or a grid that no type of tensor holds exactly.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            "--format=gguf needs the package gguf: pip install 'nibble-lm[gguf]'"
        ) from None
    if family not in _FAMILIES:
        raise InputError(
            f"--format=gguf is for {', '.join(_FAMILIES)}, and this model is a {family}; valid: "
            "--format=huggingface, which llama.cpp converts"
        )
    if config.layer_pattern != "G":
        raise InputError(
            f"--format=gguf has no model.layer_pattern={config.layer_pattern}; valid: G"
        )
    if config.rope_scaling == "linear" or (
        config.rope_scaling == "llama3" and not gguf_names.is_known_scaling(config)
    ):
        raise InputError(
            f"--format=gguf has no model.rope_scaling={config.rope_scaling} of this kind; valid: "
            "none, or llama3 as in Llama 3.1 and 3.2"
        )
    blocks = {path: block_type(path, grid) for path, grid in grids.items()}
    arch = _FAMILIES[family]
    scratch = Path(output).with_name(f".{Path(output).name}.{os.getpid()}.tmp")
    try:
        writer = gguf.GGUFWriter(scratch, arch, use_temp_file=True)  # not all tensors in memory
        kinds = sorted(set(blocks.values()))
        _write_settings(writer, config, _FILE_TYPES[kinds[0] if kinds else dtype])
        _write_tokenizer(writer, tokenizer)
        _write_tensors(writer, gguf, family, config, params, dtype, grids, blocks)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(scratch, output)
    except OSError as error:
        raise InputError(
            f"--output={output} cannot be written: {error.strerror or error}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return Path(output).stat().st_size


def block_type(path: str, grid: IntegerGrid) -> str:
    """The type of tensor that holds a grid exactly.

    Raises:
      InputError: there is none.
    """
    codes, inputs = grid.codes_LIO, grid.codes_LIO.shape[-2]
    groups = grid.scale_LGO.shape[-2]
    low, high = int(codes.min()), int(codes.max())
    kind = "TQ2_0" if low >= -1 and high <= 1 else "Q4_0" if low >= -8 and high <= 7 else "Q8_0"
    size = 256 if kind == "TQ2_0" else 32
    if kind == "TQ2_0" and inputs % size:
        kind, size = "Q4_0", 32
    if grid.minimum_LGO is not None:
        kind, size = "Q4_1", 32
        check_scales(path, grid.minimum_LGO, "F16")
        if high > 15:
            raise InputError(f"{path}: --format=gguf has grids with a minimum up to 4 bits")
    if inputs % size or (groups > 1 and (inputs // groups) % size):
        raise InputError(
            f"{path}: {inputs} inputs in {groups} groups do not fill blocks of {size} weights "
            f"({kind}); valid: --granularity=group --group_size={size}, or channel"
        )
    check_scales(path, grid.scale_LGO, "F16")
    return kind


def blocks_of(
    codes_OI: np.ndarray,
    scale_OG: np.ndarray,
    kind: str,
    minimum_OG: np.ndarray | None = None,
) -> np.ndarray:
    """The bytes of a tensor, uint8 [O, bytes of a row].

    Q8_0: float16 scale, 32 int8. Q4_0: float16 scale, 16 bytes with weights 0-15 in the low four
    bits and 16-31 in the high ones, as code + 8. Q4_1: the same, a float16 minimum after the scale,
    the code itself. TQ2_0: 64 bytes with code + 1 of weights 32 apart
    in two bits each, for each half of the block, then the scale.
    """
    size = 256 if kind == "TQ2_0" else 32
    rows, inputs = codes_OI.shape
    times = inputs // size // scale_OG.shape[1]
    scale, *least = (
        np.repeat(x, times, axis=1).astype(np.float16)[..., None].view(np.uint8)
        for x in (scale_OG, minimum_OG)
        if x is not None
    )
    codes = codes_OI.reshape(rows, inputs // size, size)
    if kind == "Q8_0":
        parts = [scale, codes.view(np.uint8)]
    elif kind in ("Q4_0", "Q4_1"):
        stored = (codes + 8 * (kind == "Q4_0")).astype(np.uint8)
        parts = [scale, *least, stored[..., :16] | (stored[..., 16:] << 4)]
    else:
        stored = (codes + 1).astype(np.uint8).reshape(rows, -1, 2, 4, 32)
        shifts = (np.arange(4) * 2).astype(np.uint8)[:, None]
        parts = [np.bitwise_or.reduce(stored << shifts, axis=3).reshape(rows, -1, 64), scale]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _write_settings(writer, c: ModelConfig, file_type: int) -> None:
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_rope_dimension_count(c.head_width)
    if c.head_width * c.heads != c.width:
        writer.add_key_length(c.head_width)
        writer.add_value_length(c.head_width)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(file_type)


def _write_tokenizer(writer, tokenizer: Subwords) -> None:
    definition = json.loads(tokenizer.definition)
    pre = pre_of(definition)
    if pre is None:
        raise InputError(
            "--format=gguf: how this tokenizer splits text has no name in GGUF; valid: "
            "--format=huggingface"
        )
    ids = tokenizer.vocabulary()
    added = {one["id"]: one["special"] for one in definition.get("added_tokens", ())}
    tokens = [""] * (max(ids.values()) + 1)
    for token, index in ids.items():
        tokens[index] = token
    kinds = [
        _NORMAL if i not in added else _CONTROL if added[i] else _USER for i in range(len(tokens))
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.beginning_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensors(writer, gguf, family, config, params, dtype, grids, blocks) -> None:
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
    holders = {
        tensor.theirs.format(layer): (tensor.ours[0], layer)
        for tensor in FAMILIES[family].tensors(config)
        for layer in range(config.layers)
    }
    if config.rope_scaling == "llama3":
        writer.add_tensor("rope_freqs.weight", gguf_names.rope_factors(config))
    for entry in entries(family, config, params, "F32"):
        path, layer = holders[entry.name]
        module = entry.name.split(".")[-2]
        permuted = heads.get(module) if _FAMILIES[family] == "llama" else None
        name = gguf_names.gguf_name(entry.name)
        if path in grids:
            parts = [np.ascontiguousarray(x[layer].T) for x in grids[path] if x is not None]
            if permuted:
                parts = [gguf_rows(part, permuted) for part in parts]
            codes, scale, *minimum = parts
            raw = blocks_of(codes, scale, blocks[path], *minimum)
            kind = gguf.GGMLQuantizationType[blocks[path]]
            writer.add_tensor(name, raw, raw_dtype=kind)
            continue
        values = entry.values()
        values = gguf_rows(values, permuted) if permuted else values
        if values.ndim == 1 or dtype == "F32":
            writer.add_tensor(name, values)
        elif dtype == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
