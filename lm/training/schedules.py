"""Learning rates by step, of one phase and of two, and what changes when a run goes on."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.compression.phases import Phases, plan_phases
from lm.errors import InputError
from lm.model.config import check_choice

_EXTENDED = "optimizer.extended_from"

# Decay from 1 to 0 for u from 0 to 1.
_SHAPES: dict[str, Callable[[Any], jax.Array]] = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + jnp.cos(jnp.pi * u)) / 2,
    "sqrt": lambda u: 1 - jnp.sqrt(u),
}


def make_schedule(c: ConfigDict, steps: int, peak: float) -> optax.Schedule:
    """Learning rate by step: linear warmup to `peak`, then by `optimizer.schedule`.

    Warmup: peak (t + 1) / warmup_steps at step t from 0. Then

      cosine    half a cosine down to final_fraction * peak
      wsd       constant, then over the last decay_fraction of all steps a decay to
                final_fraction * peak (arXiv 2405.18392). With u from 0 to 1 in the decay it has the
                shape 1 - u (linear), (1 + cos(pi u)) / 2 (cosine) or 1 - sqrt(u) (sqrt)
      constant  no decay

    With `optimizer.extended_from` = (N1, N2, ...) the steps before N1 have the schedule of a run of
    N1 steps. The steps from each N to the next, and from the last N to `steps`, decay once more:
    from the learning rate of step N - 1 to final_fraction times that, by a cosine (cosine), by the
    decay shape (wsd), or not at all (constant).

    Args:
      c: the `optimizer` section.
      steps: steps of the whole schedule.
      peak: learning rate after warmup.

    Raises:
      InputError: a number out of range, or one that does not fit the number of steps.
    """
    check_choice("optimizer.schedule", c.schedule, ("cosine", "wsd", "constant"))
    check_choice("optimizer.decay_shape", c.decay_shape, tuple(_SHAPES))
    for key in ("decay_fraction", "final_fraction"):
        if not 0 <= c[key] <= 1:
            raise InputError(f"optimizer.{key}={c[key]} must be between 0 and 1")
    ends = (*extensions(c), steps)
    if ends[0] < min(steps, 1) or any(a >= b for a, b in itertools.pairwise(ends)):
        raise InputError(
            f"optimizer.extended_from={ends[:-1]} must be numbers of steps in increasing order, "
            f"from 1 and below train.steps={steps}"
        )
    schedule = _first(c, ends[0], peak)
    for start, end in itertools.pairwise(ends):
        last = float(schedule(start - 1))
        schedule = optax.join_schedules([schedule, _decay(c, last, end - start)], [start])
    return schedule


def _first(c: ConfigDict, steps: int, peak: float) -> optax.Schedule:
    """The schedule without extensions."""
    if not 0 <= c.warmup_steps < max(steps, 1):
        raise InputError(
            f"optimizer.warmup_steps={c.warmup_steps} must be 0 or above and below "
            f"train.steps={steps}"
        )
    # From peak / warmup, not from 0: the first step would change nothing.
    warmup = optax.linear_schedule(peak / max(c.warmup_steps, 1), peak, max(c.warmup_steps - 1, 1))
    if c.schedule == "constant":
        return optax.join_schedules([warmup, optax.constant_schedule(peak)], [c.warmup_steps])
    if c.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, steps - c.warmup_steps, c.final_fraction)
        return optax.join_schedules([warmup, rest], [c.warmup_steps])
    start = decay_start(c, steps)
    if start < c.warmup_steps:
        raise InputError(
            f"optimizer.decay_fraction={c.decay_fraction} of {steps} steps begins before the end "
            f"of optimizer.warmup_steps={c.warmup_steps}"
        )
    decay = _decay(c, peak, steps - start)
    return optax.join_schedules(
        [warmup, optax.constant_schedule(peak), decay], [c.warmup_steps, start]
    )


def _decay(c: ConfigDict, first: float, steps: int) -> optax.Schedule:
    """From `first` to final_fraction * first in a number of steps, counted from 0."""
    if c.schedule == "constant":
        return optax.constant_schedule(first)
    shape = _SHAPES["cosine" if c.schedule == "cosine" else c.decay_shape]

    def rate(step):
        u = jnp.clip(step / max(steps, 1), 0.0, 1.0)
        return first * (c.final_fraction + (1 - c.final_fraction) * shape(u))

    return rate


def extensions(c: ConfigDict) -> tuple[int, ...]:
    """`optimizer.extended_from`; () for the config of an older run, without that key."""
    return tuple(c.get("extended_from") or ())


def decay_start(c: ConfigDict, steps: int) -> int:
    """The first step of the decay of schedule wsd."""
    return steps - round(c.decay_fraction * steps)


def make_phase_schedule(config: ConfigDict, phases: Phases, peak: float) -> optax.Schedule:
    """Learning rate by step of a run with a full-precision and a quantized phase.

    Fused (arXiv 2509.22935): one schedule wsd over all steps. The quantized phase begins at the
    stable learning rate and the decay runs inside it. Not fused: the `optimizer` section over the
    steps of the first phase, its decay included, then once more over those of the second, with a
    warmup of quantization.warmup_steps and quantization.peak_factor times the peak.

    Args:
      config: of the run.
      phases: its steps and the first quantized one.
      peak: learning rate after warmup.

    Raises:
      InputError: the phases do not fit the schedule.
    """
    c, q, steps, switch = config.optimizer, config.quantization, phases.steps, phases.switch
    if switch in (0, steps):
        return make_schedule(c, steps, peak)
    if extensions(c):
        raise InputError(
            f"optimizer.extended_from={extensions(c)} is for runs of one phase; this one is "
            f"quantized from step {switch} on; valid: ()"
        )
    if phases.fused:
        if c.schedule != "wsd":
            raise InputError(
                f"quantization.fused_cooldown=True needs a stable phase to begin in, which "
                f"optimizer.schedule={c.schedule!r} has not; valid: 'wsd', or "
                "quantization.fused_cooldown=False"
            )
        if not c.warmup_steps <= switch <= decay_start(c, steps):
            raise InputError(
                f"quantization.fused_cooldown=True: the quantized phase begins at step {switch} "
                f"(quantization.fraction={phases.fraction:.3g} of {steps} steps), which is not in "
                f"the stable phase from step {c.warmup_steps} (optimizer.warmup_steps) to "
                f"{decay_start(c, steps)} (optimizer.decay_fraction={c.decay_fraction})"
            )
        return make_schedule(c, steps, peak)
    if not 0 <= q.warmup_steps < steps - switch:
        raise InputError(
            f"quantization.warmup_steps={q.warmup_steps} must be 0 or above and below the "
            f"{steps - switch} steps of the quantized phase"
        )
    if q.peak_factor <= 0:
        raise InputError(f"quantization.peak_factor={q.peak_factor} must be above 0")
    again = c.copy_and_resolve_references()
    again.warmup_steps = q.warmup_steps
    return optax.join_schedules(
        [
            make_schedule(c, switch, peak),
            make_schedule(again, steps - switch, q.peak_factor * peak),
        ],
        [switch],
    )


def describe_change(
    recorded: Mapping[str, Any], config: ConfigDict, parameters: int, step: int
) -> str:
    """What another train.steps or `optimizer` section changes for a run that goes on, in one line.

    Args:
      recorded: the config of config.json, as the run before left it; {} for none.
      config: of the run that goes on.
      parameters: their number, which decides quantization.fraction="optimal".
      step: steps that have counted so far: the next one has the learning rate of this index.

    Returns:
      The keys, and the learning rates of the last step and of the next; "" where nothing changes.
    """
    if not recorded or not step:
        return ""
    old = ConfigDict(recorded)
    pairs = {"train.steps": (old.train.steps, config.train.steps)}
    for key, value in config.optimizer.items():
        pairs[f"optimizer.{key}"] = old.optimizer.get(key, value), value
    pairs[_EXTENDED] = extensions(old.optimizer), extensions(config.optimizer)
    changed = [f"{key} {was} -> {now}" for key, (was, now) in pairs.items() if was != now]
    if not changed:
        return ""

    def rate(c, index):
        schedule = make_phase_schedule(
            c, plan_phases(c, parameters), c.optimizer.peak_learning_rate
        )
        return float(schedule(index))

    last, following = rate(old, step - 1), rate(config, step)
    line = (
        f"changed: {', '.join(changed)}; the learning rate of the last step was {last:.3g}, that "
        f"of the next is {following:.3g}"
    )
    before, after = pairs[_EXTENDED]
    if old.train.steps < config.train.steps and following > last and not after:
        line += f"; {_EXTENDED}={(*before, old.train.steps)} continues the recorded schedule"
    return line
