"""What happens beside the training steps: lists of (when, what), both functions of the loop."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from lm.compression import packed
from lm.compression.phases import has_grids
from lm.data import ngram
from lm.errors import writing
from lm.evaluation import perplexity
from lm.parallel.cross_process import from_first_process
from lm.training.interruption import validation_batches
from lm.training.logging import plot_curves, read_metrics
from lm.training.quantized_phase import (
    adapt_widths,
    begin_quantized,
    plan_is_due,
    quantized_phase_begins,
)

if TYPE_CHECKING:
    from lm.training.loop import Loop

Events = Sequence[tuple[Callable[["Loop"], bool], Callable[["Loop"], Any]]]


def evaluation_is_due(loop: "Loop") -> bool:
    """At multiples of evaluation.every_steps but for the last step, which has its own."""
    every, steps = loop.config.evaluation.every_steps, loop.config.train.steps
    return bool(every) and loop.step % every == 0 and 0 < loop.step < steps


def evaluation_was_cut_short(loop: "Loop") -> bool:
    """Whether the restored step has an evaluation that was not written down."""
    if not evaluation_is_due(loop):
        return False
    return not from_first_process(jax.process_index() == 0 and bool(_validations(loop)))


def evaluate_some(loop: "Loop") -> None:
    """Evaluates evaluation.batches batches, and draws a sample."""
    evaluate(loop, loop.config.evaluation.batches or None)
    sample(loop)


def evaluate(loop: "Loop", limit: int | None) -> None:
    """Writes a line of kind "validation", and sets `loop.validation`; all batches without limit."""
    loop.report()
    before, built = loop.watch.read(), loop.built
    trained, quantized = built.usable(loop.state)
    with validation_batches(loop) as batches:
        result = perplexity.evaluate(
            loop.eval_step,
            trained,
            batches,
            built.mesh,
            limit,
            quantized=quantized,
            terms=loop.terms and loop.terms(loop.state),
        )
    line = result.figures()
    answered = {}
    if loop.held_out:
        answered = loop.held_out(trained, quantized, loop.check_interrupt)
        line |= answered
    on_tasks = loop.tasks(trained, quantized, loop.check_interrupt) if loop.tasks else {}
    line |= on_tasks
    shown = (
        f"step {loop.step}: validation loss {result.loss:.4f} nats/token, "
        f"{result.bits_per_byte:.4f} bits/byte"
    )
    if "accuracy" in result.terms:
        shown += f", accuracy {result.terms['accuracy']:.4f}"
    if answered:
        shown += f", reward {answered['reward']:.4f}, solved {answered['solved']:.4f}"
    shown += "".join(
        f", {name} {value:.4f}" for name, value in on_tasks.items() if name.endswith("/acc")
    )
    if built.quantized:
        line |= built.quantized.report(trained)
        shown += (
            f" (full precision {result.full_precision_loss:.4f}, "
            f"quantized {result.quantized_loss:.4f})"
        )
    loop.writer.write(loop.step, "validation", {**line, "whole": limit is None})
    loop.say(shown)
    loop.watch.exclude(before)
    loop.validation = result


def sample(loop: "Loop") -> str:
    """Writes samples/step_N.txt; returns the text, "" where none is asked for.

    Of a policy gradient that are answers of the batch of the last step, with their rewards.
    """
    c, before = loop.config.evaluation, loop.watch.read()
    if not c.sample_tokens:
        return ""
    trained, quantized = loop.built.usable(loop.state)
    text = loop.source.samples()
    if not text:
        text = loop.samplers[quantized](trained, c.sample_prompt, loop.step, c.sample_tokens)
    if jax.process_index() == 0:
        folder = loop.workdir / "samples"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            (folder / f"step_{loop.step}.txt").write_text(text)
    loop.watch.exclude(before)
    return text


def save_is_due(loop: "Loop") -> bool:
    """After checkpoint.every_steps or every_minutes, and at checkpoint.at_steps; not at the end."""
    c = loop.config.checkpoint
    if loop.step >= loop.config.train.steps:
        return False
    if loop.step in c.at_steps or (c.every_steps and loop.step % c.every_steps == 0):
        return True
    return loop.minutes_are_over() if jax.process_count() == 1 else loop.time_is_up


def save(loop: "Loop") -> None:
    """Saves a checkpoint."""
    loop.save()


def end_is_new(loop: "Loop") -> bool:
    """Whether this run was not finished before this start; sets `loop.validation` where it was.

    Process 0 has written the last evaluation, and may be the only one that sees it.
    """
    found = None
    if jax.process_index() == 0:
        whole = [line for line in _validations(loop) if line["whole"]]
        if whole:
            names = perplexity.Evaluation._fields
            found = perplexity.Evaluation(**{f: whole[-1][f] for f in names if f in whole[-1]})
    if not from_first_process(found is not None):
        return True
    loop.validation = found or perplexity.Evaluation(math.nan, math.nan, math.nan, 0.0)
    return False


def _validations(loop: "Loop") -> list[dict[str, Any]]:
    """The lines of kind "validation" of this step."""
    lines = read_metrics(loop.workdir)
    return [line for line in lines if line["kind"] == "validation" and line["step"] == loop.step]


def conclude(loop: "Loop") -> None:
    """The whole validation split, a sample, the last checkpoint and the packed weights."""
    evaluate(loop, None)
    if text := sample(loop):
        loop.say("sample: " + text[:300].replace("\n", "\n        "))
    loop.save()
    pack(loop)


def pack(loop: "Loop") -> None:
    """Writes the quantized weights as one packed file, next to the checkpoints."""
    c = loop.config
    trained, quantized = loop.built.usable(loop.state)
    if not quantized or not has_grids(c.quantization):
        return
    if jax.process_count() > 1 or "://" in str(loop.workdir):
        loop.say("packed weights: from one process, python -m launch.quantize --workdir=...")
        return
    path = loop.workdir / "packed.safetensors"
    with writing(path):
        size = packed.write_packed(
            path,
            packed.code_leaves(trained.params, trained.scales, loop.built.quantized.rules),
            config=c.to_dict(),
            vocab_size=loop.built.model.config.vocab_size,
            tokenizer=getattr(loop.data.tokenizer, "definition", ""),
            chat_template=loop.data.tokenizer.chat_template or "",
            step=loop.step,
        )
    loop.say(f"packed weights: {path}, {size:,} bytes")


def baseline(loop: "Loop") -> float | None:
    """Bits per byte of the n-gram model, computed once a work directory."""
    order = loop.config.evaluation.ngram_order
    if not order or jax.process_index():
        return None
    for line in read_metrics(loop.workdir):
        if line.get("event") == f"{order}-gram":
            return line["bits_per_byte"]
    texts = (
        (document.text.encode() for corpus in split for document in corpus.documents)
        for split in (loop.data.train, loop.data.validation)
    )
    value = ngram.witten_bell_bits_per_byte(*texts, order)
    loop.writer.write(loop.step, "event", {"event": f"{order}-gram", "bits_per_byte": value})
    return value


def is_first_process(loop: "Loop") -> bool:
    """Whether this process writes the files of the run."""
    return jax.process_index() == 0


def plot(loop: "Loop") -> None:
    """Draws curves.png."""
    loop.writer.flush()
    with writing(loop.workdir):
        plot_curves(loop.workdir)


ON_RESUME: Events = [(evaluation_was_cut_short, evaluate_some)]
BEFORE_STEP: Events = [(quantized_phase_begins, begin_quantized), (plan_is_due, adapt_widths)]
AFTER_STEP: Events = [(evaluation_is_due, evaluate_some), (save_is_due, save)]
AT_END: Events = [(end_is_new, conclude), (is_first_process, baseline), (is_first_process, plot)]
