"""Writes a model in a form that other programs read.

python -m launch.export --model=runs/tuned --format=huggingface --output=tuned_hf
"""

from pathlib import Path
from typing import Any

from absl import flags

from launch import command, workdir
from lm.errors import InputError

_FORMATS = ("huggingface", "compressed_tensors", "gguf")
_FORMAT = flags.DEFINE_enum("format", None, _FORMATS, "What to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ("float32", "bfloat16", "float16"), "Type of the numbers that are written."
)


def main() -> None:
    """Writes the model and prints its size and family."""
    if _FORMAT.value is None:
        raise InputError(f"--format=FORMAT is missing; valid: {', '.join(_FORMATS)}")
    if not command.OUTPUT.value:
        raise InputError("--output=PATH is missing: the folder or file to make")
    command.use_compilation_cache()
    from lm.pretrained import huggingface

    huggingface.check_output(Path(command.OUTPUT.value))
    loaded = workdir.load_chosen()
    size, family = _write_huggingface(loaded)
    print(f"{_FORMAT.value}: {command.OUTPUT.value}, {family}, {size:,} bytes")
