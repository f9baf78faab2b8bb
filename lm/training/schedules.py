"""Learning rates by step, of one phase and of two."""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.compression.phases import Phases
from lm.errors import InputError
from lm.model.config import check_choice


def make_schedule(c: ConfigDict, steps: int, peak: float) -> optax.Schedule:
    """Learning rate by step: linear warmup to `peak`, then by `optimizer.schedule`.

    cosine: half a cosine to final_fraction * peak. wsd (arXiv 2405.18392): constant, then a decay
    over the last decay_fraction of all steps, with u from 0 to 1 in it and shape 1 - u (linear),
    (1 + cos(pi u)) / 2 (cosine) or 1 - sqrt(u) (sqrt). constant: no decay.
    """
    check_choice("optimizer.schedule", c.schedule, ("cosine", "wsd", "constant"))
    check_choice("optimizer.decay_shape", c.decay_shape, ("linear", "cosine", "sqrt"))
    if not 0 <= c.warmup_steps < max(steps, 1):
        raise InputError(
            f"optimizer.warmup_steps={c.warmup_steps} must be 0 or above and below "
            f"train.steps={steps}"
        )
    for key in ("decay_fraction", "final_fraction"):
        if not 0 <= c[key] <= 1:
            raise InputError(f"optimizer.{key}={c[key]} must be between 0 and 1")
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
    shape = {
        "linear": lambda u: 1 - u,
        "cosine": lambda u: (1 + jnp.cos(jnp.pi * u)) / 2,
        "sqrt": lambda u: 1 - jnp.sqrt(u),
    }[c.decay_shape]

    def decay(step):
        u = jnp.clip(step / max(steps - start, 1), 0.0, 1.0)
        return peak * (c.final_fraction + (1 - c.final_fraction) * shape(u))

    return optax.join_schedules(
        [warmup, optax.constant_schedule(peak), decay], [c.warmup_steps, start]
    )


def decay_start(c: ConfigDict, steps: int) -> int:
    """The first step of the decay of schedule wsd."""
    return steps - round(c.decay_fraction * steps)


def make_phase_schedule(config: ConfigDict, phases: Phases, peak: float) -> optax.Schedule:
    """Learning rate by step of a run with a full-precision and a quantized phase.

    Fused (arXiv 2509.22935): one schedule wsd over all steps. The quantized phase begins at the
    stable learning rate and the decay runs inside it. Not fused: the `optimizer` section over the
    steps of the first phase, its decay included, then once more over those of the second, with a
    warmup of quantization.warmup_steps and quantization.peak_factor times the peak.

    Raises:
      InputError: the phases do not fit the schedule.
    """
    c, q, steps, switch = config.optimizer, config.quantization, phases.steps, phases.switch
    if switch in (0, steps):
        return make_schedule(c, steps, peak)
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
