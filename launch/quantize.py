"""Puts a trained model on grids and writes it as one packed file, with its config.

python -m launch.quantize --model=runs/quickstart --bits=4 --output=int4.safetensors

A run that was trained with quantization is written with its own grids if --bits is left out.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, workdir
from lm import strict_json
from lm.errors import InputError
from lm.model.config import check_choice

_BITS = flags.DEFINE_float(
    "bits", None, "Width of the layers' matrices, to quantize after training."
)
_METHOD = flags.DEFINE_string(
    "method", "rtn", "rtn (round to nearest), gptq, or rsq (GPTQ, tokens weighted by attention)."
)
_QUANTIZER = flags.DEFINE_string("quantizer", "absmax", "A name of objectives/quantization.")
_GRANULARITY = flags.DEFINE_string("granularity", None, "tensor, channel or group.")
_GROUP_SIZE = flags.DEFINE_integer("group_size", None, "Inputs in a group; of granularity group.")
_OUTER_BITS = flags.DEFINE_float(
    "outer_bits", 4.0, "Least width of the embedding and the head; 16 keeps them as they are."
)
_SEARCH = flags.DEFINE_bool(
    "search",
    None,
    "Scales of least error instead of the largest weight's; by default with every --method but rtn "
    "where the quantizer has a search.",
)
_BATCHES = flags.DEFINE_integer(
    "calibration_batches", 8, "Batches of --corpus that a method other than rtn reads."
)
_VALIDATION = flags.DEFINE_integer(
    "validation_batches",
    None,
    "Batches of the validation split that losses are of; all by default.",
)
_DAMPING = flags.DEFINE_float("damping", 0.01, "gptq, rsq: share of the mean diagonal added to it.")
_ACT_ORDER = flags.DEFINE_bool(
    "act_order", True, "gptq, rsq: inputs with the largest Hessian first; scales as before that."
)
_TRUE_SEQUENTIAL = flags.DEFINE_bool(
    "true_sequential", False, "gptq, rsq: Hessians behind the matrices before, inside of a layer."
)
_SCALES = flags.DEFINE_string(
    "scales",
    "float32",
    "float32 | float16 | bfloat16: type that scales are rounded to before the last evaluation; "
    "launch.export needs that of its format.",
)
_METRICS = flags.DEFINE_string(
    "metrics", None, "Folder with the metrics.jsonl that gets the losses, too."
)
_REPORT = flags.DEFINE_string(
    "report", None, "HTML page to write: errors, weights, scales, losses and bytes."
)
_COMPARE = flags.DEFINE_list(
    "compare", [], "METHOD or METHOD:BITS,... that --report shows beside this one."
)


@dataclasses.dataclass
class _Source:
    """The model that is quantized, and what it is measured with."""

    run: Any
    trained: Any
    data: Any
    evaluate: Any
    before: Any
    batches: list[Any] | None = None

    def calibration(self) -> list[Any]:
        """The first training batches, read once."""
        from lm.parallel.mesh import put_batch
        from lm.training import experiment

        if self.batches is None:
            stream = iter(experiment.train_batches(self.run.config, self.data))
            with contextlib.closing(stream):
                taken = itertools.islice(stream, _BATCHES.value)
                self.batches = [put_batch(self.run.mesh, batch) for batch in taken]
        return self.batches


def main() -> None:
    """Quantizes, writes the file, and prints losses and sizes."""
    _check()
    command.use_compilation_cache()
    import jax

    if _BITS.value is not None:
        _rules(_METHOD.value, _BITS.value)
    loaded = workdir.merged(workdir.load_chosen())
    if command.CORPUS.value:
        loaded.config.data.corpus = command.CORPUS.value
    with jax.set_mesh(loaded.run.mesh):
        source, quantized = _open(loaded)
        began = time.perf_counter()
        result = _put_on_grids(source, quantized)
        seconds = time.perf_counter() - began
        after = source.evaluate(result.params)
        size = _write(loaded, result) if command.OUTPUT.value else math.nan
        if _METRICS.value:
            _record(Path(_METRICS.value), loaded.step, source.before, after, size)
        _show(jax.tree.leaves(source.trained.params), source.before, after, size)
        if _REPORT.value:
            _write_page(loaded, source, result, (after, size, seconds))
    if command.OUTPUT.value:
        print(f"next: python -m launch.evaluate --model={command.OUTPUT.value}")


def _open(loaded: Any) -> tuple[_Source, bool]:
    """The source, and whether it is on grids already."""
    import jax

    from lm.data import corpora
    from lm.evaluation import perplexity
    from lm.model.trained import Trained
    from lm.training import experiment
    from lm.training.step import make_eval_step

    run, c = loaded.run, loaded.config
    options = {
        "directory": c.data.directory,
        "validation_fraction": c.data.validation_fraction,
    }
    texts = [corpora.load(c.data.corpus, split, **options) for split in ("train", "validation")]
    data = experiment.Data(*texts, loaded.tokenizer)
    trained, quantized = run.usable(loaded.state)
    if jax.tree.leaves(trained.loss):
        raise InputError(
            f"objective.loss={c.objective.loss!r} of this run has parameters of its own, for "
            "which a packed file has no place"
        )
    if _BITS.value is None and not quantized:
        raise InputError("--bits=WIDTH is missing: this run was not trained with quantization")

    def measure(step, trained, quantized):
        batches = experiment.evaluation_batches(c, data.validation, data.tokenizer)
        limit = _VALIDATION.value
        return perplexity.evaluate(step, trained, batches, run.mesh, limit, quantized=quantized)

    plain = jax.jit(make_eval_step(run.model, c.objective.block_size, None, run.objective.loss))
    before = measure(run.eval_step(), trained, quantized)
    return _Source(
        run._replace(config=c),
        trained,
        data,
        lambda params: measure(plain, Trained(params), False),
        before,
    ), quantized


def _put_on_grids(source: _Source, quantized: bool) -> Any:
    """By the run's own rules and scales without --bits, else by --method."""
    from lm.compression import after_training

    if _BITS.value is not None:
        return _quantize(source, _METHOD.value, _BITS.value)
    trained = source.trained
    result = after_training.put_on_grids(trained.params, trained.scales, source.run.quantized.rules)
    return after_training.with_scales(result, _SCALES.value)


def _quantize(source: _Source, method: str, bits: float) -> Any:
    from lm.compression import after_training, methods

    options = methods.Options(
        damping=_DAMPING.value,
        act_order=_ACT_ORDER.value,
        static_groups=_ACT_ORDER.value,
        true_sequential=_TRUE_SEQUENTIAL.value,
    )
    batches = [] if method in methods.WITHOUT_DATA else source.calibration()
    try:
        result = methods.quantize_after_training(
            method, source.run.model, source.trained.params, batches, _rules(method, bits), options
        )
    except ValueError as error:
        raise InputError(f"--quantizer={_QUANTIZER.value}: {error}") from None
    return after_training.with_scales(result, _SCALES.value)


def _rules(method: str, bits: float) -> Any:
    from lm.compression.phases import default_rules, with_search
    from objectives.quantization import QUANTIZERS
    from objectives.quantization.scale_search import SEARCHED

    name = _QUANTIZER.value
    check_choice("--quantizer", name, tuple(QUANTIZERS))
    factory, search = QUANTIZERS[name], _SEARCH.value
    if search is None:
        search = method != "rtn" and name in SEARCHED
    layout = {"granularity": _GRANULARITY.value, "group_size": _GROUP_SIZE.value}
    layout = {option: value for option, value in layout.items() if value is not None}
    try:
        made = with_search(factory) if search else factory
        return default_rules(bits, made, outer_bits=_OUTER_BITS.value, **layout)
    except ValueError as error:
        raise InputError(f"--quantizer={name} --bits={bits:g}: {error}") from None


def _write(loaded: Any, result: Any) -> int:
    from lm.compression import packed

    tokenizer = loaded.tokenizer
    return packed.write_packed(
        command.OUTPUT.value,
        result.leaves(),
        config=loaded.config.to_dict(),
        vocab_size=loaded.run.model.config.vocab_size,
        tokenizer=getattr(tokenizer, "definition", ""),
        chat_template=tokenizer.chat_template or "",
        step=loaded.step,
    )


def _show(leaves: Any, before: Any, after: Any, size: float) -> None:
    """Prints losses before and after, and sizes in bytes."""
    count, whole = sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
    for name, s in (("before", before), ("after", after)):
        print(f"validation {name}: {s.loss:.4f} nats/token, {s.bits_per_byte:.4f} bits/byte")
    print(f"parameters: {count:,}, {whole:,} bytes")
    if not math.isnan(size):
        print(f"file: {size:,} bytes, {8 * size / count:.2f} bits a weight with scales and header")


def _record(folder: Path, step: int, before: Any, after: Any, size: int) -> None:
    """Writes a metrics.jsonl of one evaluation, as that of a run ends with."""
    score = after._replace(full_precision_loss=before.loss, quantized_loss=after.loss)
    line = {"step": step, "kind": "validation", **score._asdict(), "whole": True, "bytes": size}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(strict_json.dumps(line) + "\n")


def _write_page(loaded: Any, source: _Source, result: Any, measured: tuple[Any, ...]) -> None:
    """The page of --report, with the other methods of --compare."""
    from launch import quantization_page
    from lm.compression.report import describe

    description = describe(source.trained.params, result)
    count = description.total.parameters

    def row(method, bits, result, after, size, seconds):
        of_quantizer = next(iter(result.coded.values())).quantizer
        if math.isnan(size):
            size = describe(source.trained.params, result).total.after
        return quantization_page.Run(
            method,
            bits,
            of_quantizer.name,
            of_quantizer.granularity,
            of_quantizer.group_size,
            source.before.loss,
            after.loss,
            after.bits_per_byte,
            size,
            8 * size / count,
            seconds,
        )

    own = (_METHOD.value, _BITS.value)
    if _BITS.value is None:
        own = ("trained", source.run.config.quantization.bits)
    rows = [row(*own, result, *measured)]
    for method, bits in _compared():
        began = time.perf_counter()
        other = _quantize(source, method, bits)
        seconds = time.perf_counter() - began
        rows.append(row(method, bits, other, source.evaluate(other.params), math.nan, seconds))
        print(f"{method}, {bits:g} bits: {rows[-1].loss_after:.4f} nats/token")
    name = Path(command.chosen()).name
    page = quantization_page.quantization_page(name, description, rows)
    command.write_text(Path(_REPORT.value), page)
    print(f"page: {_REPORT.value}")


def _compared() -> Sequence[tuple[str, float]]:
    """(method, bits) of every entry of --compare."""
    from lm.compression.methods import METHODS

    found = []
    for entry in _COMPARE.value:
        method, _, bits = entry.partition(":")
        check_choice("--compare", method, tuple(METHODS))
        try:
            width = float(bits) if bits else _BITS.value
        except ValueError:
            width = None
        if width is None:
            raise InputError(f"--compare={entry}: valid: METHOD:BITS, such as gptq:4")
        found.append((method, width))
    return found


def _check() -> None:
    """Refuses what needs no model to be seen wrong."""
    from lm.compression.methods import METHODS

    after = ("method", "quantizer", "granularity", "group_size", "outer_bits", "search")
    for name in (*after, "calibration_batches", "damping", "act_order", "true_sequential"):
        if _BITS.value is None and flags.FLAGS[name].present:
            raise InputError(f"--{name} needs --bits=WIDTH; without, the run's own grids are taken")
    if not (command.OUTPUT.value or _REPORT.value):
        raise InputError("--output=FILE is missing, for example --output=int4.safetensors")
    if _COMPARE.value and not _REPORT.value:
        raise InputError("--compare needs --report=PAGE.html")
    for flag in (command.OUTPUT, _REPORT):
        folder = Path(flag.value or ".").parent
        if not folder.is_dir():
            raise InputError(f"--{flag.name}={flag.value}: there is no folder {folder}")
    check_choice("--method", _METHOD.value, tuple(METHODS))
    check_choice("--scales", _SCALES.value, ("float32", "float16", "bfloat16"))
    _compared()
    for flag in (_BATCHES, _VALIDATION):
        if flag.value is not None and flag.value < 1:
            raise InputError(f"--{flag.name}={flag.value} must be at least 1")
    if not 0 < _DAMPING.value < 1:
        raise InputError(f"--damping={_DAMPING.value:g} must be above 0 and below 1")


if __name__ == "__main__":
    command.run(main)
