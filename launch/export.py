"""Writes a model in a form that other programs read.

python -m launch.export --model=runs/tuned --format=huggingface --output=tuned
"""

from pathlib import Path

from absl import flags

from launch import command, workdir
from lm.data.tokenizers import Subwords
from lm.errors import InputError

_FORMATS = ("huggingface", "peft")
_FORMAT = flags.DEFINE_string("format", None, f"What to write: {' | '.join(_FORMATS)}.")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPE = flags.DEFINE_string(
    "dtype", "float32", f"Type of the numbers that are written: {' | '.join(_DTYPES)}."
)


def main() -> None:
    """Writes the model and prints its family and size."""
    for flag, valid in ((_FORMAT, _FORMATS), (_DTYPE, tuple(_DTYPES))):
        if flag.value not in valid:
            raise InputError(f"--{flag.name}={flag.value} is not one of: {', '.join(valid)}")
    output = command.OUTPUT.value
    if not output:
        raise InputError("--output=PATH is missing: the folder to make")
    command.use_compilation_cache()
    from lm.pretrained import huggingface

    huggingface.check_output(Path(output))
    write = {"huggingface": _write_folder, "peft": _write_adapters}[_FORMAT.value]
    family, size = write(workdir.load_chosen(), output)
    print(f"{output}: {_FORMAT.value}, {family}, {size:,} bytes of weights")


def _write_folder(loaded: workdir.Loaded, output: str) -> tuple[str, int]:
    """The family and the bytes of a Hugging Face folder, with adapters merged."""
    import jax

    loaded = workdir.merged(loaded)

    from lm.pretrained import huggingface, start

    if not isinstance(loaded.tokenizer, Subwords):
        raise InputError("a model of bytes has no tokenizer.json, which --format=huggingface needs")
    config, dtype = loaded.run.model.config, _DTYPES[_DTYPE.value]
    family, settings = huggingface.settings_of(config, dtype, loaded.config.initialise.family)
    tokenizer = loaded.tokenizer
    settings |= {
        "bos_token_id": tokenizer.beginning_of_text,
        "eos_token_id": tokenizer.end_of_text,
    }
    with jax.set_mesh(loaded.run.mesh):
        params = loaded.run.plain(loaded.state).params
        tensors = list(huggingface.entries(family, config, params, dtype))
        files = start.tokenizer_files(tokenizer) | huggingface.generation_config(settings)
        return family, huggingface.write_folder(output, settings, tensors, files)


def _write_adapters(loaded: workdir.Loaded, output: str) -> tuple[str, int]:
    """The family and the bytes of a folder of adapters."""
    import jax

    from lm.pretrained import huggingface, peft

    config, c = loaded.run.model.config, loaded.config.initialise
    settings = peft.adapter_settings(config, c.family, c["from"])
    params = jax.device_get(loaded.run.plain(loaded.state).params)
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


if __name__ == "__main__":
    command.run(main)
