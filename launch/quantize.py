"""Puts a trained run on grids and writes it as one packed file, with its config.

python -m launch.quantize --workdir=runs/quickstart --bits=4 --output=int4.safetensors

A run that was trained with quantization is written with its own grids if --bits is left out.
"""

import contextlib
import functools
import itertools
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, workdir
from lm.errors import InputError

_BITS = flags.DEFINE_float(
    "bits", None, "Width of the layers' matrices, to quantize after training."
)
_OUTPUT = flags.DEFINE_string("output", None, "File to write, as MODEL.safetensors.")
_METHOD = flags.DEFINE_string("method", "rtn", "rtn (round to nearest), gptq, or rsq (weighted).")
_QUANTIZER = flags.DEFINE_string("quantizer", "absmax", "A name of objectives/quantization.")
_GRANULARITY = flags.DEFINE_string("granularity", None, "tensor, channel or group.")
_GROUP_SIZE = flags.DEFINE_integer("group_size", None, "Inputs in a group; of granularity group.")
_BATCHES = flags.DEFINE_integer("calibration_batches", 8, "Training batches for gptq and rsq.")

_METHODS = ("rtn", "gptq", "rsq")


def main() -> None:
    """Quantizes, writes the file, and prints losses and sizes."""
    _check()
    command.use_compilation_cache()
    import jax

    from lm.data import corpora
    from lm.training import evaluation, experiment, packed, post_training, sharding
    from lm.training.state import Trained
    from lm.training.step import make_eval_step
    from objectives.quantization.post_training import rsq_importance

    rules = _rules() if _BITS.value is not None else None
    loaded = workdir.load(command.WORKDIR.value, command.STEP.value)
    c, model, mesh = loaded.config, loaded.run.model, loaded.run.mesh
    train, validation = (
        corpora.load(
            c.data.corpus,
            split,
            directory=c.data.directory,
            validation_fraction=c.data.validation_fraction,
        )
        for split in ("train", "validation")
    )

    def evaluate(eval_step, trained, quantized):
        batches = experiment.evaluation_batches(c, validation, loaded.tokenizer)
        return evaluation.evaluate(eval_step, trained, batches, mesh, quantized=quantized)

    def calibration():
        data = experiment.Data(train, validation, loaded.tokenizer)
        with contextlib.closing(iter(experiment.train_batches(c, data))) as batches:
            taken = itertools.islice(batches, _BATCHES.value)
            return [sharding.put_batch(mesh, batch) for batch in taken]

    with jax.set_mesh(mesh):
        trained, quantized = loaded.run.usable(loaded.state)
        if rules is None and not quantized:
            raise InputError("--bits=WIDTH is missing: this run was not trained with quantization")
        params = trained.params
        try:
            if rules is None:
                own = loaded.run.quantized.rules
                result = post_training.put_on_grids(params, trained.scales, own)
            elif _METHOD.value == "rtn":
                result = post_training.round_to_nearest_model(params, rules)
            else:
                # The best floor without a rotation of the model, from a summary of the paper.
                rsq = functools.partial(rsq_importance, smallest=0.1)
                importance = rsq if _METHOD.value == "rsq" else None
                result = post_training.gptq_model(model, params, calibration(), rules, importance)
        except ValueError as error:
            raise InputError(f"--quantizer={_QUANTIZER.value}: {error}") from None
        before = evaluate(loaded.run.eval_step(), trained, quantized)
        plain = jax.jit(make_eval_step(model, c.objective.block_size))
        after = evaluate(plain, Trained(result.params), False)
    definition = getattr(loaded.tokenizer, "definition", "")
    size = packed.write_packed(
        _OUTPUT.value,
        result.leaves(),
        config=c.to_dict(),
        vocab_size=model.config.vocab_size,
        tokenizer=definition,
        step=loaded.step,
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for name, score in (("before", before), ("after", after)):
        print(
            f"validation {name}: {score.loss:.4f} nats/token, {score.bits_per_byte:.4f} bits/byte"
        )
    print(f"parameters: {count:,}, {whole:,} bytes")
    print(f"file: {size:,} bytes, {8 * size / count:.2f} bits a weight with scales and header")
    print(f"next: python -m launch.evaluate --packed={_OUTPUT.value}")


def _rules() -> Any:
    from objectives.quantization import QUANTIZERS, default_rules

    name, bits = _QUANTIZER.value, _BITS.value
    if name not in QUANTIZERS:
        raise InputError(f"--quantizer={name} is not one of: {', '.join(QUANTIZERS)}")
    layout = {"granularity": _GRANULARITY.value, "group_size": _GROUP_SIZE.value}
    layout = {option: value for option, value in layout.items() if value is not None}
    try:
        return default_rules(bits, QUANTIZERS[name], **layout)
    except ValueError as error:
        raise InputError(f"--quantizer={name} --bits={bits:g}: {error}") from None


def _check() -> None:
    """Refuses what needs no model to be seen wrong."""
    if not _OUTPUT.value:
        raise InputError("--output=FILE is missing, for example --output=int4.safetensors")
    folder = Path(_OUTPUT.value).parent
    if not folder.is_dir():
        raise InputError(f"--output={_OUTPUT.value}: there is no folder {folder}")
    if _METHOD.value not in _METHODS:
        raise InputError(f"--method={_METHOD.value} is not one of: {', '.join(_METHODS)}")
    if _BATCHES.value < 1:
        raise InputError(f"--calibration_batches={_BATCHES.value} must be at least 1")


if __name__ == "__main__":
    command.run(main)
