"""What a run says of itself: its first line, and a line of metrics now and then."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from lm.planning.flops import parameters_by_group
from lm.training import schedules
from lm.training.progress import duration
from lm.training.sources import Spent
from lm.training.state import parameter_shapes
from lm.training.trainable import split

if TYPE_CHECKING:
    from lm.training.loop import Loop


class Logged(NamedTuple):
    """When a line of metrics was written: the step, seconds of the run, what its source spent."""

    step: int
    seconds: float
    spent: Spent


def introduce(loop: "Loop") -> None:
    """Says how large everything is."""
    c, model = loop.config, loop.built.model.config
    count = sum(parameters_by_group(parameter_shapes(loop.built.model)).values())
    live, _ = split(loop.state.trained, loop.built.trainable)
    moved = sum(parameters_by_group(live.params).values())
    trained = "" if moved == count else f", {moved:,} of them trained"
    loop.say(
        f"{count:,} parameters{trained}, vocabulary {model.vocab_size:,}, "
        f"{c.train.batch_size * c.data.sequence_length:,} tokens a step, "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    )


def describe_change(loop: "Loop", recorded: Mapping[str, Any]) -> str:
    """See `schedules.describe_change`."""
    count = sum(parameters_by_group(parameter_shapes(loop.built.model)).values())
    counted = loop.step - int(loop.state.skipped)
    return schedules.describe_change(recorded, loop.config, count, counted)


def log(loop: "Loop", step: int, values: dict[str, Any]) -> None:
    """Adds a line of kind "train", and shows it.

    Tokens per second are those of the training steps: the seconds in which a policy gradient draws
    and judges answers are not among them, and have figures of their own.
    """
    c, now = loop.config, Logged(step, loop.watch.read(), loop.source.spent)
    since, loop.logged = loop.logged, now
    tokens = c.train.batch_size * c.data.sequence_length
    line = {**values, "tokens": step * tokens}
    shown = f"step {step}/{c.train.steps}  loss {values['loss']:.4f}"
    if "reward" in values:
        shown += f"  reward {values['reward']:.3f}"
    if step > since.step:
        spent = Spent(*(b - a for a, b in zip(since.spent, now.spent, strict=True)))
        seconds = now.seconds - since.seconds - spent.compiling
        asking = spent.sampling + spent.judging
        rate = (step - since.step) * tokens / (seconds - asking)
        line["tokens_per_second"] = rate
        shown += f"  {rate:,.0f} tokens/s"
        if asking:
            line |= sampling_figures(spent, seconds)
            shown += f", sampling {line['sampling_share']:.0%} of the time"
        if loop.peak:
            line["mfu"] = rate * loop.built.flops_per_token() / loop.peak
            shown += f"  MFU {line['mfu']:.1%}"
        left = (c.train.steps - step) * seconds / (step - since.step)
        shown += f"  ETA {duration(left)}"
    loop.writer.write(step, "train", line)
    if loop.progress:
        loop.progress.set_postfix_str(f"loss {values['loss']:.3f}")
        loop.progress.update(step - loop.progress.n)
    else:
        loop.say(shown)


# What of a line of metrics depends on the clock.
TIMED = (
    "tokens_per_second",
    "mfu",
    "sampled_tokens_per_second",
    "sampling_seconds",
    "sampling_share",
    "judging_share",
)


def sampling_figures(spent: Spent, seconds: float) -> dict[str, float]:
    """Seconds of drawing, tokens drawn in each, and the shares of all `seconds` since a line."""
    figures = {
        "sampling_seconds": spent.sampling,
        "sampling_share": spent.sampling / seconds,
        "judging_share": spent.judging / seconds,
    }
    if spent.sampling:
        figures["sampled_tokens_per_second"] = spent.tokens / spent.sampling
    return figures
