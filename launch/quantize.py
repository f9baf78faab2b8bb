"""Puts a trained run on grids and writes it as one packed file, with its config.

python -m launch.quantize --model=runs/quickstart --bits=4 --output=int4.safetensors

A run that was trained with quantization is written with its own grids if --bits is left out.
"""

import contextlib
import functools
import itertools
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, workdir
from lm import strict_json
from lm.errors import InputError

_BITS = flags.DEFINE_float(
    "bits", None, "Width of the layers' matrices, to quantize after training."
)
_METHOD = flags.DEFINE_string("method", "rtn", "rtn (round to nearest), gptq, or rsq (weighted).")
_QUANTIZER = flags.DEFINE_string("quantizer", "absmax", "A name of objectives/quantization.")
_GRANULARITY = flags.DEFINE_string("granularity", None, "tensor, channel or group.")
_GROUP_SIZE = flags.DEFINE_integer("group_size", None, "Inputs in a group; of granularity group.")
_BATCHES = flags.DEFINE_integer("calibration_batches", 8, "Training batches for gptq and rsq.")
_SCALES = flags.DEFINE_string(
    "scales",
    "float32",
    "float32 | float16 | bfloat16: type that scales are rounded to before the last evaluation; "
    "launch.export needs that of its format.",
)
_METRICS = flags.DEFINE_string(
    "metrics", None, "Folder with the metrics.jsonl that gets the losses, too."
)

_METHODS = ("rtn", "gptq", "rsq")


def main() -> None:
    """Quantizes, writes the file, and prints losses and sizes."""
    _check()
    command.use_compilation_cache()
    import jax

    from lm.compression import after_training, packed
    from lm.data import corpora
    from lm.evaluation import perplexity
    from lm.model.trained import Trained
    from lm.training import experiment
    from lm.training.step import make_eval_step

    rules = None if _BITS.value is None else _rules()
    loaded = workdir.merged(workdir.load_chosen())
    run, c = loaded.run, loaded.config
    data = experiment.Data(
        *(
            corpora.load(
                c.data.corpus,
                split,
                directory=c.data.directory,
                validation_fraction=c.data.validation_fraction,
            )
            for split in ("train", "validation")
        ),
        loaded.tokenizer,
    )

    def evaluate(eval_step, trained, quantized):
        batches = experiment.evaluation_batches(c, data.validation, data.tokenizer)
        return perplexity.evaluate(eval_step, trained, batches, run.mesh, quantized=quantized)

    with jax.set_mesh(run.mesh):
        trained, quantized = run.usable(loaded.state)
        if jax.tree.leaves(trained.loss):
            raise InputError(
                f"objective.loss={c.objective.loss!r} of this run has parameters of its own, for "
                "which a packed file has no place"
            )
        if rules is None and not quantized:
            raise InputError("--bits=WIDTH is missing: this run was not trained with quantization")
        result = after_training.with_scales(_put_on_grids(run, trained, rules, data), _SCALES.value)
        before = evaluate(run.eval_step(), trained, quantized)
        plain = jax.jit(make_eval_step(run.model, c.objective.block_size, None, run.objective.loss))
        after = evaluate(plain, Trained(result.params), False)
    size = packed.write_packed(
        command.OUTPUT.value,
        result.leaves(),
        config=c.to_dict(),
        vocab_size=run.model.config.vocab_size,
        tokenizer=getattr(data.tokenizer, "definition", ""),
        chat_template=data.tokenizer.chat_template or "",
        step=loaded.step,
    )
    if _METRICS.value:
        _record(Path(_METRICS.value), loaded.step, before, after, size)
    _show(jax.tree.leaves(trained.params), before, after, size)


def _show(leaves: Any, before: Any, after: Any, size: int) -> None:
    """Prints losses before and after, and sizes in bytes."""
    count, whole = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
    for name, s in (("before", before), ("after", after)):
        print(f"validation {name}: {s.loss:.4f} nats/token, {s.bits_per_byte:.4f} bits/byte")
    print(f"parameters: {count:,}, {whole:,} bytes")
    print(f"file: {size:,} bytes, {8 * size / count:.2f} bits a weight with scales and header")
    print(f"next: python -m launch.evaluate --model={command.OUTPUT.value}")


def _record(folder: Path, step: int, before: Any, after: Any, size: int) -> None:
    """Writes a metrics.jsonl of one evaluation, as that of a run ends with."""
    score = after._replace(full_precision_loss=before.loss, quantized_loss=after.loss)
    line = {"step": step, "kind": "validation", **score._asdict(), "whole": True, "bytes": size}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(strict_json.dumps(line) + "\n")


def _put_on_grids(run: Any, trained: Any, rules: Any, data: Any) -> Any:
    """By the run's own rules and scales where `rules` is None, else by --method."""
    from lm.compression import after_training
    from lm.parallel.mesh import put_batch
    from lm.training import experiment
    from objectives.quantization.gptq import RSQ_SMALLEST, rsq_importance

    if rules is None:
        return after_training.put_on_grids(trained.params, trained.scales, run.quantized.rules)
    try:
        if _METHOD.value == "rtn":
            return after_training.round_to_nearest_model(trained.params, rules)
        with contextlib.closing(iter(experiment.train_batches(run.config, data))) as stream:
            taken = itertools.islice(stream, _BATCHES.value)
            batches = [put_batch(run.mesh, batch) for batch in taken]
        rsq = functools.partial(rsq_importance, smallest=RSQ_SMALLEST)
        importance = rsq if _METHOD.value == "rsq" else None
        return after_training.gptq_model(run.model, trained.params, batches, rules, importance)
    except ValueError as error:
        raise InputError(f"--quantizer={_QUANTIZER.value}: {error}") from None


def _rules() -> Any:
    from lm.compression.phases import default_rules
    from objectives.quantization import QUANTIZERS

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
    for name in ("method", "quantizer", "granularity", "group_size", "calibration_batches"):
        if _BITS.value is None and flags.FLAGS[name].present:
            raise InputError(f"--{name} needs --bits=WIDTH; without, the run's own grids are taken")
    if not command.OUTPUT.value:
        raise InputError("--output=FILE is missing, for example --output=int4.safetensors")
    folder = Path(command.OUTPUT.value).parent
    if not folder.is_dir():
        raise InputError(f"--output={command.OUTPUT.value}: there is no folder {folder}")
    if _METHOD.value not in _METHODS:
        raise InputError(f"--method={_METHOD.value} is not one of: {', '.join(_METHODS)}")
    if _SCALES.value not in ("float32", "float16", "bfloat16"):
        raise InputError(f"--scales={_SCALES.value} is not one of: float32, float16, bfloat16")
    if _BATCHES.value < 1:
        raise InputError(f"--calibration_batches={_BATCHES.value} must be at least 1")


if __name__ == "__main__":
    command.run(main)
