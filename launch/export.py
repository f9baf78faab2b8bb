"""Writes a model in a form that other programs read.

python -m launch.export --model=runs/tuned --format=huggingface --output=tuned
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, workdir
from lm.data.tokenizers import Subwords
from lm.errors import InputError

_FORMATS = ("huggingface", "peft", "compressed_tensors", "gguf")
_FORMAT = flags.DEFINE_string("format", None, f"What to write: {' | '.join(_FORMATS)}.")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPE = flags.DEFINE_string(
    "dtype", "float32", f"Type of floats, and of scales: {' | '.join(_DTYPES)}."
)


def main() -> None:
    """Writes the model and prints its family and size."""
    for flag, valid in ((_FORMAT, _FORMATS), (_DTYPE, tuple(_DTYPES))):
        if flag.value not in valid:
            raise InputError(f"--{flag.name}={flag.value} is not one of: {', '.join(valid)}")
    output = command.OUTPUT.value
    if not output:
        raise InputError("--output=PATH is missing: the folder or file to make")
    command.use_compilation_cache()
    import jax

    from lm.pretrained import huggingface

    huggingface.check_output(Path(output), folder=_FORMAT.value != "gguf")
    write = {
        "huggingface": _write_folder,
        "peft": _write_adapters,
        "compressed_tensors": _write_compressed,
        "gguf": _write_gguf,
    }[_FORMAT.value]
    loaded = workdir.load_chosen()
    if _FORMAT.value != "peft":
        loaded = workdir.merged(loaded)
        if not isinstance(loaded.tokenizer, Subwords):
            raise InputError(f"a model of bytes has no tokenizer.json: no --format={_FORMAT.value}")
    with jax.set_mesh(loaded.run.mesh):
        family, size = write(loaded, output)
    print(f"{output}: {_FORMAT.value}, {family}, {size:,} bytes")


def _settings(loaded: workdir.Loaded) -> tuple[str, dict[str, Any]]:
    """The model_type and the content of config.json."""
    from lm.pretrained import huggingface

    config, dtype = loaded.run.model.config, _DTYPES[_DTYPE.value]
    family, settings = huggingface.settings_of(config, dtype, loaded.config.initialise.family)
    tokenizer = loaded.tokenizer
    ends = {"bos_token_id": tokenizer.beginning_of_text, "eos_token_id": tokenizer.end_of_text}
    return family, settings | ends


def _write_folder(loaded: workdir.Loaded, output: str) -> tuple[str, int]:
    """A Hugging Face folder; adapters are merged, quantized weights are written as floats."""
    from lm.pretrained import huggingface, start

    family, settings = _settings(loaded)
    params = loaded.run.plain(loaded.state).params
    model = loaded.run.model.config
    tensors = list(huggingface.entries(family, model, params, _DTYPES[_DTYPE.value]))
    files = start.tokenizer_files(loaded.tokenizer) | huggingface.generation_config(settings)
    return family, huggingface.write_folder(output, settings, tensors, files)


def _write_adapters(loaded: workdir.Loaded, output: str) -> tuple[str, int]:
    """A folder of adapters for the `peft` library."""
    from lm.pretrained import huggingface, peft

    config, c = loaded.run.model.config, loaded.config.initialise
    settings = peft.adapter_settings(config, c.family, c["from"])
    params = loaded.run.plain(loaded.state).params
    tensors = peft.adapter_entries(config, c.family, params, _DTYPES[_DTYPE.value])
    size = huggingface.write_folder(
        output,
        settings,
        tensors,
        {},
        settings_name="adapter_config.json",
        weights_name="adapter_model.safetensors",
    )
    return f"adapters of {c['from'] or 'its base'}", size


def _grids(coded: Mapping[str, Any]) -> dict[str, Any]:
    """The integer grids of the layers' matrices; embedding and head are written as floats."""
    from lm.compression.integer_grids import integer_grid
    from lm.model.parameters import parameter_kind

    return {p: integer_grid(p, c) for p, c in coded.items() if parameter_kind(p) == "matrix"}


def _write_compressed(loaded: workdir.Loaded, output: str) -> tuple[str, int]:
    """A Hugging Face folder with packed integer weights."""
    from lm.pretrained import compressed_tensors, huggingface, start

    coded, dtype = workdir.on_grids(loaded), _DTYPES[_DTYPE.value]
    grids = _grids(coded)
    if not grids:
        raise InputError(
            "--format=compressed_tensors is for quantized models: give a file of launch.quantize, "
            "or a run that was trained with quantization"
        )
    quantizer = coded[next(iter(grids))].quantizer
    bits = one_width([coded[path].quantizer for path in grids])
    compressed_tensors.check(bits, grids, dtype)
    family, settings = _settings(loaded)
    group_size = quantizer.group_size
    settings["quantization_config"] = compressed_tensors.quantization_config(int(bits), group_size)
    params, model = loaded.run.plain(loaded.state).params, loaded.run.model.config
    tensors = compressed_tensors.packed_entries(family, model, params, grids, dtype, int(bits))
    files = start.tokenizer_files(loaded.tokenizer) | huggingface.generation_config(settings)
    return family, huggingface.write_folder(output, settings, tensors, files)


def one_width(quantizers: list[Any]) -> float:
    """The width of all matrices, for a format that declares one.

    Raises:
      InputError: they have several.
    """
    from objectives.quantization import Mixed

    widths = {w for q in quantizers for w in (q.widths if isinstance(q, Mixed) else [q.bits])}
    if len(widths) > 1:
        raise InputError(
            "--format=compressed_tensors is written for one width, and the matrices of this model "
            f"have {', '.join(f'{w:g}' for w in sorted(widths))} bits; valid: --format=gguf, or a "
            "model without quantization.widths"
        )
    return widths.pop()


def _write_gguf(loaded: workdir.Loaded, output: str) -> tuple[str, int]:
    """A GGUF file, of floats or with the model's own codes."""
    from lm.pretrained.gguf_writer import write_gguf

    family, _ = _settings(loaded)
    params, config = loaded.run.plain(loaded.state).params, loaded.run.model.config
    dtype, tokenizer = _DTYPES[_DTYPE.value], loaded.tokenizer
    grids = _grids(workdir.on_grids(loaded))
    return family, write_gguf(output, family, config, params, tokenizer, dtype, grids)


if __name__ == "__main__":
    command.run(main)
