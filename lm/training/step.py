"""One optimizer step and one evaluation step, as pure functions to be jitted.

B rows, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.compression.adaptation import change_scales
from lm.compression.phases import Quantized
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.references.sources import BASE, EMA
from lm.training.forward import (
    ReferenceModel,
    base_model,
    make_forward,
    make_prediction_statistics,
    make_training_statistics,
    token_keys,
)
from lm.training.gradients import make_gradients
from lm.training.state import TrainState, average_as_model, check_unchanged, next_average
from lm.training.trainable import Trainable, join, split
from objectives import Objective
from objectives.losses import CROSS_ENTROPY, Loss
from objectives.terms import masked_sum

# The moving average of the gradient norm that defines a spike.
_NORM_MEMORY = 0.99
_NORM_WARMUP = 20


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    objective: Objective,
    config: ConfigDict,
    quantized: Quantized | None = None,
    second_models: Mapping[str, Model] | None = None,
    trainable: Trainable = lambda path: True,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch, frozen) -> (state, metrics): gradients, clipping, update, or skip.

    `second_models` maps sources of `objective.references` to models; `frozen` maps the same sources
    to what was trained of them, and is {} by default. `trainable` says which parameters
    have gradients; the others are the same arrays in both states.

    A step is skipped, which keeps the old state but for its counters, when its loss or gradient is
    not finite, when all weights are zero, or when the gradient norm is above spike_factor times
    its moving average. Metrics are float32 scalars. With `quantized` it is a step of the quantized
    phase; the two phases are two programs.
    """
    c = config.train
    statistics = make_training_statistics(model, config.objective.block_size, objective, quantized)
    random = "keys" in objective.batch_keys or model.config.adapter_dropout > 0
    reference_models = make_reference_models(model, objective, config, quantized, second_models)

    def train_step(state, batch, frozen=None):
        ema = average_as_model(model, state.ema) if state.ema else ()
        models = reference_models(state.trained, {EMA: ema, **(frozen or {})})
        if random:
            batch = {**batch, "keys": token_keys(c.seed, state.step, batch["targets"].shape)}
        if objective.perturb:
            batch = objective.perturb(batch)
        live, held = split(state.trained, trainable)
        gradients = make_gradients(_of_live(statistics, held), objective, c.accumulation)
        grads, metrics, objective_state = gradients(
            live, batch, state.objective, state.step, models
        )
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & (metrics["weight_sum"] != 0)
        counted = state.step - state.skipped
        if c.spike_factor:
            calm = norm <= c.spike_factor * state.norm_mean
            good &= calm | (counted < _NORM_WARMUP)
        with jax.named_scope("optimizer"):  # as lm/planning/profile.py looks for it
            updates, optimizer_state = optimizer.update(grads, state.optimizer, live)
            trained = join(optax.apply_updates(live, updates), held)
        ema = next_average(state.ema, trained, c.ema_decay) if c.ema_decay else ()
        new = state._replace(
            trained=trained,
            optimizer=optimizer_state,
            ema=ema,
            objective=objective_state,
            skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row),
            norm_mean=_next_norm_mean(state.norm_mean, norm, counted),
        )
        check_unchanged(state, new)
        old = state._replace(skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
        state = _select(good, new, old, trainable)._replace(step=old.step + 1)
        if "pair_ids" in objective.batch_keys:
            metrics["padding"] = jnp.mean(batch["segment_ids"] == 0, dtype=jnp.float32)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": schedule(counted),
            "skipped_steps": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step


def _next_norm_mean(norm_mean: jax.Array, norm: jax.Array, counted: jax.Array) -> jax.Array:
    """The moving average of the gradient norm after a step, with `counted` steps before it."""
    # 1 - memory^n corrects for the start at 0 in the first steps.
    memory = jnp.minimum(_NORM_MEMORY, counted / (counted + 1.0))
    return memory * norm_mean + (1 - memory) * norm


def _select(good: jax.Array, new: TrainState, old: TrainState, trainable: Trainable) -> TrainState:
    """`new` where `good`, else `old`. What is frozen is the same in both and needs no selection."""
    (live, held), (before, _) = (split(state.trained, trainable) for state in (new, old))
    new, old = new._replace(trained=live), old._replace(trained=before)
    # Select, do not multiply by zero: 0 * NaN is NaN.
    state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    return state._replace(trained=join(state.trained, held))


def _of_live(statistics: Callable[..., Any], held: Any) -> Callable[..., Any]:
    """`statistics` as a function of what is trained alone."""
    return lambda live, *others, **options: statistics(join(live, held), *others, **options)


def make_reference_models(
    model: Model,
    objective: Objective,
    config: ConfigDict,
    quantized: Quantized | None,
    second_models: Mapping[str, Model] | None,
) -> Callable[[Trained, Mapping[str, Any]], dict[str, ReferenceModel]]:
    """(trained, {source: what was trained of it}) -> {name of a reference: its model}.

    The moving average is read as the model is, second models without quantization (see
    `References.restore`), and so is the model below the adapters: its frozen weights as they are
    stored. Attention is not cut: a reference attends to whole segments. Logits are divided by the
    temperature of the objective's loss, as those of the trained model are.
    """
    block_size, taps = config.objective.block_size, objective.reference_taps
    temperature = objective.loss.temperature
    whole = objective.loss._replace(attention_blocks=None)
    functions = {
        EMA: (
            make_forward(model, quantized, taps=taps),
            make_prediction_statistics(model, block_size, quantized, whole, temperature),
            model.config.logit_softcap,
        )
    }
    for source, one in (second_models or {}).items():
        statistics = make_prediction_statistics(one, block_size, temperature=temperature)
        forward = make_forward(one, taps=taps)
        functions[source] = forward, statistics, one.config.logit_softcap

    def models(trained, others):
        of_source = {source: ReferenceModel(*functions[source], x) for source, x in others.items()}
        if BASE in config.objective.references.values() and model.config.adapter_rank:
            base, its = base_model(model, trained)
            statistics = make_prediction_statistics(base, block_size, temperature=temperature)
            of_source[BASE] = ReferenceModel(
                make_forward(base, taps=taps), statistics, base.config.logit_softcap, its
            )
        return {
            name: of_source[source]
            for name, source in config.objective.references.items()
            if source in of_source
        }

    return models


def make_begin_quantized(
    optimizer: optax.GradientTransformation,
    quantized: Quantized,
    config: ConfigDict,
    trainable: Trainable = lambda path: True,
) -> Callable[[TrainState], TrainState]:
    """state -> state at the start of the quantized phase: scales from the weights as they are.

    The moments of the optimizer go on (those of the scales are zero), or begin anew with
    `quantization.reset_optimizer`, its schedule going on either way: arXiv 2509.22935 does not say
    which (unconfirmed).
    """

    def rescaled(trained):
        return trained._replace(scales=quantized.first_scales(trained.params))

    def begin(state):
        trained = rescaled(state.trained)
        moments = state.optimizer
        if config.quantization.reset_optimizer:
            (_, count), *_ = optax.tree.get_all_with_path(moments, "count", _of_schedule)
            moments = optax.tree.set(
                optimizer.init(split(trained, trainable)[0]), _of_schedule, count=count
            )
        ema = rescaled(state.ema) if config.train.ema_decay else ()
        return state._replace(trained=trained, optimizer=moments, ema=ema)

    return begin


def make_change_widths(quantized: Quantized) -> Callable[..., TrainState]:
    """(state, path -> numbers of the layers' quantizers [L]) -> state with layers on them.

    Layers that change get the scales that their new quantizers start from; moments go on.
    """

    def changed(trained, indices):
        scales = change_scales(quantized.rules, trained.params, trained.scales, indices)
        return trained._replace(scales=scales)

    def change(state, indices):
        ema = changed(state.ema, indices) if state.ema else ()
        return state._replace(trained=changed(state.trained, indices), ema=ema)

    return change


def _of_schedule(path, value) -> bool:
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"


def make_eval_step(
    model: Model,
    block_size: int,
    quantized: Quantized | None = None,
    loss: Loss = CROSS_ENTROPY,
) -> Callable[..., dict[str, jax.Array]]:
    """(trained, batch) -> sums over the batch: w * nll, w, w * bytes.

    The nll is that of the distribution which `loss` predicts, whatever is minimised. With
    `quantized`, "quantized_nll" as well: w * nll with the weights on their grids. Of preference
    data the chosen or desirable answers count alone: what is to become likely.
    """
    statistics = make_prediction_statistics(model, block_size, None, loss)
    on_grid = make_prediction_statistics(model, block_size, quantized, loss)

    def eval_step(trained, batch):
        w_BT = batch["weights"]
        if "sides" in batch:
            w_BT = jnp.where(batch["sides"] > 0, w_BT, 0.0)
        sums = {
            "nll": masked_sum(w_BT, statistics(trained, batch).nll),
            "weight": jnp.sum(w_BT),
            "bytes": masked_sum(w_BT, batch["num_bytes"].astype(jnp.float32)),
        }
        if quantized is not None:
            sums["quantized_nll"] = masked_sum(w_BT, on_grid(trained, batch).nll)
        return sums

    return eval_step
