"""Puts a trained model on grids and writes it as one packed file, with its config.

python -m launch.quantize --model=runs/quickstart --bits=4 --output=int4.safetensors

A run that was trained with quantization is written with its own grids if --bits is left out.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import Any

from launch import command, workdir
from launch import quantize_options as options
from lm import strict_json
from lm.errors import InputError


@dataclasses.dataclass
class _Source:
    """The model that is quantized, and what it is measured with."""

    run: Any
    trained: Any
    data: Any
    measure: Any
    before: Any
    batches: list[Any] | None = None
    widths: dict[str, Any] | None = None

    def evaluate(self, made: Any) -> Any:
        """The score of a model on its grids, with activations, keys and values as its config says.

        The result is what the evaluation of its file will give.
        """
        import jax

        from lm.compression.methods import with_changes
        from lm.compression.phases import quantized_while_running
        from lm.training.step import make_eval_step

        c, result = self.run.config, made.result
        model = with_changes(self.run.model, made.changes)
        trained, rounding = quantized_while_running(
            c.quantization, model, result.params, result.key_scales
        )
        step = make_eval_step(model, c.objective.block_size, rounding, self.run.objective.loss)
        return self.measure(jax.jit(step), trained, rounding is not None)

    def calibration(self) -> list[Any]:
        """The first training batches, read once."""
        from lm.parallel.mesh import put_batch
        from lm.training import experiment

        if self.batches is None:
            stream = iter(experiment.train_batches(self.run.config, self.data))
            with contextlib.closing(stream):
                taken = itertools.islice(stream, options.BATCHES.value)
                self.batches = [put_batch(self.run.mesh, batch) for batch in taken]
        return self.batches


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """The config with keys of its model section changed."""
    config = config.copy_and_resolve_references()
    config.model.update(changes)
    return config


def main() -> None:
    """Quantizes, writes the file, and prints losses and sizes."""
    options.check()
    command.use_compilation_cache()
    import jax

    if options.BITS.value is not None:
        options.make_rules(options.METHOD.value, options.BITS.value)
    loaded = workdir.merged(workdir.load_chosen())
    if options.BITS.value is not None:
        loaded.config.quantization.update(
            activations=options.ACTIVATIONS.value, cache=options.CACHE.value
        )
    if command.CORPUS.value:
        loaded.config.data.corpus = command.CORPUS.value
    with jax.set_mesh(loaded.run.mesh):
        source = _open(loaded)
        began = time.perf_counter()
        made = _put_on_grids(source)
        seconds = time.perf_counter() - began
        after = source.evaluate(made)
        size = _write(loaded, made) if command.OUTPUT.value else math.nan
        if options.METRICS.value:
            _record(Path(options.METRICS.value), loaded.step, source.before, after, size)
        _show(jax.tree.leaves(source.trained.params), source.before, after, size)
        if options.REPORT.value:
            _write_page(source, made, (after, size, seconds))
    if command.OUTPUT.value:
        print(f"next: python -m launch.evaluate --model={command.OUTPUT.value}")


def _open(loaded: Any) -> _Source:
    import jax

    from lm.data import corpora
    from lm.evaluation import perplexity
    from lm.training import experiment

    run, c = loaded.run, loaded.config
    where = {
        "directory": c.data.directory,
        "validation_fraction": c.data.validation_fraction,
    }
    texts = [corpora.load(c.data.corpus, split, **where) for split in ("train", "validation")]
    data = experiment.Data(*texts, loaded.tokenizer)
    trained, quantized = run.usable(loaded.state)
    if jax.tree.leaves(trained.loss):
        raise InputError(
            f"objective.loss={c.objective.loss!r} of this run has parameters of its own, for "
            "which a packed file has no place"
        )
    if options.BITS.value is None and not quantized:
        raise InputError("--bits=WIDTH is missing: this run was not trained with quantization")

    def measure(step, trained, quantized):
        batches = experiment.evaluation_batches(c, data.validation, data.tokenizer)
        limit = options.VALIDATION.value
        return perplexity.evaluate(step, trained, batches, run.mesh, limit, quantized=quantized)

    before = measure(run.eval_step(), trained, quantized)
    return _Source(run._replace(config=c), trained, data, measure, before)


def _put_on_grids(source: _Source) -> Any:
    """By the run's own rules and scales without --bits, else by --method."""
    from lm.compression import after_training, methods

    if options.BITS.value is not None:
        return _quantize(source, options.METHOD.value, options.BITS.value)
    trained = source.trained
    result = after_training.put_on_grids(trained.params, trained.scales, source.run.quantized.rules)
    result = after_training.with_scales(result, options.SCALES.value)
    return methods.Quantization({}, trained.params, result)


def _quantize(source: _Source, method: str, bits: float) -> Any:
    from lm.compression import after_training, methods
    from lm.compression.cache import CACHES, calibrate_cache
    from lm.compression.phases import ACTIVATIONS, make_product
    from objectives.quantization import activation_quantizer

    rotate = options.ROTATE.value
    settings = methods.Options(
        rotate=method == "rsq" if rotate is None else rotate,
        activation=activation_quantizer(ACTIVATIONS[options.ACTIVATIONS.value]),
        damping=options.DAMPING.value,
        act_order=options.ACT_ORDER.value,
        static_groups=options.ACT_ORDER.value,
        true_sequential=options.TRUE_SEQUENTIAL.value,
    )
    batches = [] if method in methods.WITHOUT_DATA else source.calibration()
    try:
        rules = _planned(source, method, bits)
        made = methods.quantize_after_training(
            method, source.run.model, source.trained.params, batches, rules, settings
        )
    except ValueError as error:
        raise InputError(f"--quantizer={options.QUANTIZER.value}: {error}") from None
    result = after_training.with_scales(made.result, options.SCALES.value)
    bits = CACHES[options.CACHE.value]
    if bits:
        key_scales = calibrate_cache(
            methods.with_changes(source.run.model, made.changes),
            result.params,
            source.calibration(),
            bits=bits,
            product=make_product(lambda path: None, settings.activation),
        )
        result = result._replace(key_scales=key_scales)
    return made._replace(result=result)


def _planned(source: _Source, method: str, bits: float) -> Any:
    """The rules of a method at a width, with the widths of --widths or --budget over them."""
    rules, quantizer_of = options.make_rules(method, bits)
    if not (options.WIDTHS.value or options.BUDGET.value):
        return rules
    from lm.compression import plan_widths, widths

    params = source.trained.params
    if source.widths is None and options.WIDTHS.value:
        source.widths = widths.read_widths(options.WIDTHS.value, params, "--widths")
    if source.widths is None:
        optimizer = source.run.config.optimizer
        source.widths = plan_widths.plan_widths(
            source.run.model,
            params,
            source.calibration(),
            options.BUDGET.value,
            plan_widths.make_sensitivity(options.SENSITIVITY.value, optimizer),
            rules=rules,
            choices=[float(bits) for bits in options.CHOICES.value],
            quantizer_of=quantizer_of,
        )
        for path, of_layers in source.widths.items():
            print(f"{path}: {' '.join(f'{bits:g}' for bits in of_layers)} bits")
        if options.SAVE_WIDTHS.value:
            widths.write_widths(options.SAVE_WIDTHS.value, source.widths)
    return widths.with_widths(rules, source.widths, quantizer_of)


def _write(loaded: Any, made: Any) -> int:
    from lm.compression import packed

    tokenizer = loaded.tokenizer
    return packed.write_packed(
        command.OUTPUT.value,
        made.result.leaves(),
        config=changed(loaded.config, made.changes).to_dict(),
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
    line = {"step": step, "kind": "validation", **score._asdict(), "whole": True}
    if not math.isnan(size):
        line["bytes"] = size
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(strict_json.dumps(line) + "\n")


def _write_page(source: _Source, made: Any, measured: tuple[Any, ...]) -> None:
    """The page of --report, with the other methods of --others."""
    from launch import quantization_page
    from lm.compression.report import describe

    description = describe(made.params, made.result)
    count = description.total.parameters

    def row(method, bits, made, after, size, seconds):
        of_quantizer = next(iter(made.result.coded.values())).quantizer
        if math.isnan(size):
            size = describe(made.params, made.result).total.after
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

    own = (options.METHOD.value, options.BITS.value)
    if options.BITS.value is None:
        own = ("trained", source.run.config.quantization.bits)
    rows = [row(*own, made, *measured)]
    for method, bits in options.compared():
        began = time.perf_counter()
        other = _quantize(source, method, bits)
        seconds = time.perf_counter() - began
        rows.append(row(method, bits, other, source.evaluate(other), math.nan, seconds))
        print(f"{method}, {bits:g} bits: {rows[-1].loss_after:.4f} nats/token")
    name = Path(command.chosen()).name
    page = quantization_page.quantization_page(name, description, rows)
    command.write_text(Path(options.REPORT.value), page)
    print(f"page: {options.REPORT.value}")


if __name__ == "__main__":
    command.run(main)
