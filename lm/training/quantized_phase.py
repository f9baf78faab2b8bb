"""The switch to the quantized phase, and what changes inside of it: functions of the loop."""

import contextlib
import functools
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lm.compression import cache, phases
from lm.compression.cache import of_parameters
from lm.compression.phases import has_grids
from lm.errors import InputError
from lm.evaluation import perplexity
from lm.model.parameters import path_of
from lm.parallel.mesh import put_batch
from lm.training import experiment
from lm.training.interruption import interruptible, validation_batches
from lm.training.logging import read_metrics
from objectives.quantization.gptq import RSQ_SMALLEST, rsq_importance
from objectives.quantization.mixed import MixedScale, quantizer_of_layer

if TYPE_CHECKING:
    from lm.training.loop import Loop


def quantized_phase_begins(loop: "Loop") -> bool:
    """Before the first step of the quantized phase.

    A checkpoint of the step before is one of the first phase, so that a run that goes on from it
    passes here, too.
    """
    return loop.step == loop.built.phases.switch


def begin_quantized(loop: "Loop") -> None:
    """Sets the scales from the weights, and writes down what quantizing after training gives."""
    loop.report()
    before, bits = loop.watch.read(), loop.config.quantization.bits
    results = after_training_now(loop)
    event = {"event": "quantized", "bits": bits} | losses_after_training(loop, results)
    state = loop.built.begin_quantized()(loop.state)
    method = loop.config.quantization.begin_with
    if method in results:
        state = with_result(state, results[method], loop.config.quantization.begin_unrounded)
    loop.state = with_key_scales(loop, state)
    shown = "".join(
        f", {name} {event[name]:.4f}" for name in ("rtn", "gptq", "rsq") if name in event
    )
    loop.say(f"step {loop.step}: the quantized phase begins, {bits:g} bits{shown}")
    loop.writer.write(loop.step, "event", event)
    loop.watch.exclude(before)


def after_training_now(loop: "Loop") -> dict[str, Any]:
    """What quantizing the weights of now gives: `PostTrained` by method.

    Round to nearest and GPTQ (or RSQ, if the phase begins with it) at the same widths, calibrated
    with the first training batches.
    """
    c = loop.config.quantization
    if not c.gptq_batches or not has_grids(c):
        return {}
    if jax.process_count() > 1:
        if c.begin_with in ("gptq", "rsq"):
            raise InputError(
                f"quantization.begin_with={c.begin_with!r} runs in one process; valid: 'weights', "
                "'search'"
            )
        return {}
    from lm.compression import after_training

    trained, _ = loop.built.usable(loop.state)
    batches = _first_batches(loop, c.gptq_batches)
    rules = loop.built.quantized.rules
    results = {"rtn": after_training.round_to_nearest_model(trained.params, rules)}
    method = "rsq" if c.begin_with == "rsq" else "gptq"
    importance = functools.partial(rsq_importance, smallest=RSQ_SMALLEST)
    try:
        results[method] = after_training.gptq_model(
            loop.built.model,
            trained.params,
            batches,
            rules,
            importance if method == "rsq" else None,
            act_order=True,
            static_groups=True,
            keep_unrounded=c.begin_unrounded and c.begin_with == method,
            between=loop.check_interrupt,
        )
    except ValueError as error:  # a format that GPTQ has no columns for, or a singular Hessian
        if c.begin_with == method:
            raise InputError(f"quantization.begin_with={method!r}: {error}") from None
        loop.say(f"no GPTQ to compare with: {error}")
    return results


def losses_after_training(loop: "Loop", results: dict[str, Any]) -> dict[str, float]:
    """Validation losses of the results of `after_training_now`, to compare with."""
    if not results:
        return {}
    trained, _ = loop.built.usable(loop.state)
    plain, losses = loop.built.eval_step(plain=True), {}
    limit = loop.config.evaluation.batches or None
    for name, result in results.items():
        with validation_batches(loop) as batches:
            on_grid = trained._replace(params=result.params)
            score = perplexity.evaluate(plain, on_grid, batches, loop.built.mesh, limit)
        losses[name] = score.loss
    return losses


def with_result(state: Any, result: Any, unrounded: bool = False) -> Any:
    """A state of the quantized phase with the codes and the scales of `result`, a `PostTrained`.

    The weights lie on the values of their codes, or, with `unrounded`, where the codes were rounded
    from. On its value a weight is half a step of the grid from every other code, and the gradient
    of a learned scale s, round(w / s) - w / s (LSQ, arXiv 1902.08153), begins at 0.

    The moving average, where there is one, begins anew with both.
    """
    if unrounded:
        begin = result.unrounded  # Of others, which were rounded as they are, the weights stay.
    else:
        begin = {path: coded.decode() for path, coded in result.coded.items()}

    def weights(keys, old):
        new = begin.get(path_of(keys))
        return old if new is None else jax.device_put(new.astype(old.dtype), old.sharding)

    def replaced(trained):
        def scale(keys, weights, old):
            if isinstance(old, MixedScale):
                return old._replace(scale=scale(keys, weights, old.scale))
            coded = result.coded.get(path_of(keys))
            if coded is None or not jax.tree.leaves(old):
                return old
            new = quantizer_of_layer(coded.quantizer, 0).of_grid(coded.grid)
            return jax.tree.map(lambda x, y: jax.device_put(jnp.asarray(x), y.sharding), new, old)

        of_weights = of_parameters(trained.scales)
        scales = jax.tree_util.tree_map_with_path(scale, trained.params, of_weights)
        scales = {**trained.scales, **scales}
        params = jax.tree_util.tree_map_with_path(weights, trained.params)
        return trained._replace(params=params, scales=scales)

    ema = replaced(state.ema) if jax.tree.leaves(state.ema) else state.ema
    return state._replace(trained=replaced(state.trained), ema=ema)


def with_key_scales(loop: "Loop", state: Any) -> Any:
    """The state with the scales of a quantized cache from the first training batches."""
    c, built = loop.config.quantization, loop.built
    if not built.quantized.cache or not c.cache_batches:
        return state
    stream = iter(experiment.train_batches(loop.config, loop.data, mesh=built.mesh))
    with contextlib.closing(stream):
        taken = interruptible(loop, itertools.islice(stream, c.cache_batches))
        batches = (put_batch(built.mesh, batch) for batch in taken)
        bits = cache.CACHES[c.cache]
        scales = cache.calibrate_cache(built.model, state.trained.params, batches, bits=bits)

    def replaced(trained):
        # A copy each: two parts of a state that is donated cannot be one array.
        place = jax.jit(jnp.copy, out_shardings=trained.scales[cache.KEYS].sharding)
        return trained._replace(scales={**trained.scales, cache.KEYS: place(scales)})

    ema = replaced(state.ema) if loop.config.train.ema_decay else ()
    return state._replace(trained=replaced(state.trained), ema=ema)


def plan_is_due(loop: "Loop") -> bool:
    """At the first step of the quantized phase and every quantization.adapt_every after it."""
    every, since = loop.config.quantization.adapt_every, loop.step - loop.built.phases.switch
    return bool(every) and since >= 0 and since % every == 0


def adapt_widths(loop: "Loop") -> None:
    """Plans the widths of the layers anew, and writes them down.

    The plan depends on the state, the config and the first training batches alone, so that a run
    that goes on from a checkpoint of this step makes the same.
    """
    loop.report()
    before, c, built = loop.watch.read(), loop.config, loop.built
    adaptation = built.quantized.adaptation
    batches = _first_batches(loop, c.quantization.adapt_batches)
    rates = {"beta1": c.optimizer.beta1, "beta2": c.optimizer.beta2}
    rates["learning_rate"] = float(built.schedule(loop.state.step - loop.state.skipped))
    trained, old = loop.state.trained, adaptation.widths(loop.state.trained.scales)
    on_grid = phases.on_grid(built.quantized, trained)
    widths = adaptation.plan(built.model, trained, on_grid, batches, loop.state.optimizer, **rates)
    if loop.change_widths is None:
        loop.change_widths = built.change_widths()
    loop.state = loop.change_widths(loop.state, adaptation.indices(widths))
    changed = sum(a != b for path in old for a, b in zip(old[path], widths[path], strict=True))
    event = {"event": "widths", "changed": changed, "widths": {p: list(widths[p]) for p in widths}}
    loop.say(f"step {loop.step}: {changed} layers of matrices change their widths")
    known = [line for line in read_metrics(loop.workdir) if line["step"] == loop.step]
    if not any(line.get("event") == "widths" for line in known):
        loop.writer.write(loop.step, "event", event)
    loop.watch.exclude(before)


def _first_batches(loop: "Loop", count: int) -> list[Any]:
    """The first training batches, whatever the step."""
    with contextlib.closing(iter(experiment.train_batches(loop.config, loop.data))) as stream:
        taken = itertools.islice(stream, count)
        return [put_batch(loop.built.mesh, batch) for batch in taken]
