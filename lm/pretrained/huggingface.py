"""A Hugging Face folder of a model: config.json, safetensors files and the tokenizer.

D width, V vocabulary.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import strict_json
from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.model.parameters import LAYERS
from lm.pretrained.families import FAMILIES
from lm.pretrained.family import find
from lm.pretrained.safetensors_file import DTYPES

# Bytes of one safetensors file, as transformers splits them.
_MOST_BYTES = 5_000_000_000


WRITTEN = {**DTYPES, "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}


class Entry(NamedTuple):
    """A tensor that is written: its values are computed when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Sequence[Any]
    join: Any

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * WRITTEN[self.dtype].itemsize

    def values(self) -> np.ndarray:
        """The tensor, in its type."""
        parts = [np.asarray(jax.device_get(part())) for part in self.parts]
        return np.ascontiguousarray(self.join(parts)).astype(WRITTEN[self.dtype])


def settings_of(config: ModelConfig, dtype: str, first: str = "") -> tuple[str, dict[str, Any]]:
    """The model_type of a model and its config.json, without what the tokenizer says.

    Of families that compute the same, `first` is taken.

    Raises:
      InputError: no family holds this architecture.
    """
    model_type = find(FAMILIES, config, first)
    family = FAMILIES[model_type]
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return model_type, {
        "architectures": [family.architecture],
        "model_type": model_type,
        **family.write(config),
        "vocab_size": config.vocab_size,
        "torch_dtype": names[dtype],
    }


def entries(model_type: str, config: ModelConfig, params: Any, dtype: str) -> Iterator[Entry]:
    """All tensors of a model by the names of its family."""
    leaves = _by_path(params)
    for tensor in FAMILIES[model_type].tensors(config):
        layered = tensor.ours[0].startswith(f"{LAYERS}/")
        held = [leaves[path] for path in tensor.ours]
        shapes = [leaf.shape[1:] if layered else leaf.shape for leaf in held]
        for layer in range(config.layers if layered else 1):
            index = (layer,) if layered else ()
            parts = [lambda leaf=leaf, index=index: leaf[index] for leaf in held]
            name = tensor.theirs.format(layer)
            yield Entry(name, tuple(tensor.shape(shapes)), dtype, parts, tensor.join)


def _by_path(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def generation_config(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name and content of the file that tells other programs where a text begins and ends."""
    ends = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
    return {"generation_config.json": strict_json.dumps(ends, indent=2) + "\n"}


def write_folder(
    output: str,
    settings: Mapping[str, Any],
    tensors: Sequence[Entry],
    files: Mapping[str, str],
    *,
    settings_name: str = "config.json",
    weights_name: str = "model.safetensors",
) -> int:
    """Writes a folder whole or not at all; one tensor at a time is in memory.

    Args:
      output: a folder that does not exist yet, or is empty.
      settings: content of config.json, or of the file of another name.
      tensors: all of them.
      files: name -> content of further files, such as tokenizer.json.
      settings_name, weights_name: names of the files of settings and of tensors.

    Returns:
      Bytes of the tensors.

    Raises:
      InputError: the folder is not empty, or cannot be written.
    """
    folder = Path(output)
    check_output(folder)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
        for name, content in files.items():
            (scratch / name).write_text(content)
        (scratch / settings_name).write_text(strict_json.dumps(settings, indent=2) + "\n")
        _write_weights(scratch, tensors, weights_name)
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.replace(scratch, folder)
    except OSError as error:
        raise InputError(
            f"--output={output} cannot be written: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(tensor.size for tensor in tensors)


def check_output(path: Path, *, folder: bool = True) -> None:
    """Raises InputError unless a folder, or else a file, can be made there."""
    if not folder and path.is_dir():
        raise InputError(f"--output={path} is a folder; give the name of a file")
    if folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--output={path} is there already and not an empty folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output={path}: there is no folder {path.absolute().parent}")


def _write_weights(folder: Path, tensors: Sequence[Entry], only_name: str) -> None:
    groups: list[list[Entry]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.size for t in groups[-1]) + tensor.size > _MOST_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        write_safetensors(folder / only_name, groups[0])
        return
    places = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_safetensors(folder / name, group)
        places |= {tensor.name: name for tensor in group}
    index = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": places,
    }
    text = strict_json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)


def write_safetensors(path: Path, tensors: Sequence[Entry]) -> None:
    """Writes tensors one after the other, in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.size]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end += tensor.size
    text = strict_json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = tensor.values()
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name} is {values.shape}, not {tensor.shape}")
            file.write(values.reshape(-1).view(np.uint8).data)
