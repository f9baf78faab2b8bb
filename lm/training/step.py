"""One optimizer step and one evaluation step, as pure functions to be jitted.

A micro-batches, B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.model.transformer import Model
from lm.training.quantized import Quantized
from lm.training.state import TrainState
from objectives.cross_entropy import TokenStatistics, token_statistics
from objectives.token_loss import denominators, masked_sum, token_loss
from objectives.weighting import Weighting, weight_metrics

# The moving average of the gradient norm that defines a spike.
_NORM_MEMORY = 0.99
_NORM_WARMUP = 20

# The reference that holds the losses of the moving average of the parameters.
EMA_REFERENCE = "ema_nll"


def make_forward(
    model: Model, quantized: Quantized | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(trained, batch) -> hidden states [B, T, D] and the output matrix [D, V].

    In full precision, or with weights on their grids when `quantized` is given.
    """

    def forward(trained, batch):
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        if quantized is None:
            return model.apply(trained.params, *inputs), model.head(trained.params)
        params, scales = quantized.outer(trained), trained.scales["layers"]
        hidden_BTD = model.apply(params, *inputs, product=quantized.product, scales=scales)
        return hidden_BTD, model.head(params)

    return forward


def make_statistics(
    model: Model, block_size: int, quantized: Quantized | None = None
) -> Callable[..., Any]:
    """(trained, batch) -> per-token statistics [B, T]: the model, then its head, in blocks."""
    forward = make_forward(model, quantized)

    def statistics(trained, batch):
        hidden_BTD, head_DV = forward(trained, batch)
        return token_statistics(
            hidden_BTD,
            head_DV,
            batch["targets"],
            softcap=model.config.logit_softcap,
            block_size=block_size,
        )

    return statistics


def make_gradients(
    statistics: Callable[..., Any], weighting: Weighting, *, z_loss: float, accumulation: int
) -> Callable[..., Any]:
    """(trained, batch, weighting state, step, models) -> (gradients, metrics, weighting state).

    The loss is that of `objectives.token_loss` over the whole batch, whatever the number of
    micro-batches, and so are the statistics that a weighting takes of the batch. (A mean of
    micro-batch means is another loss as soon as their weights differ.)

    With one micro-batch the weights are computed inside its only forward pass. With more, weights
    and denominators are settled on the whole batch first; where they need statistics, a forward
    pass of its own gathers them, micro-batch by micro-batch, and the gradient of the loss in the
    gathered [B, T] arrays is what the micro-batches then pass back. Gradients are added in float32.

    `models` maps the name of a reference to what was trained of the model whose losses it holds.
    """

    def settle(statistics_BT, batch, references, state, step):
        """Weights and denominators of the whole batch, state and metrics of the weighting."""
        weights_BT, state, extra = weighting.weigh(statistics_BT, batch, references, state, step)
        if weighting.detached:
            weights_BT = jax.lax.stop_gradient(weights_BT)
        totals = denominators(weights_BT, batch["weights"], weighting.normaliser)
        shape = weight_metrics(weights_BT, batch["weights"]) if weighting.report else {}
        return weights_BT, totals, state, extra | shape | {"weight_sum": jnp.sum(weights_BT)}

    def loss_of_statistics(statistics_BT, batch, references, state, step):
        weights_BT, totals, state, extra = settle(statistics_BT, batch, references, state, step)
        value, parts = token_loss(statistics_BT, weights_BT, batch["weights"], totals, z_loss)
        return value, (parts | extra, state)

    # The statistics that a gradient comes back through. To leave the entropy out is not only to
    # multiply it by zero: it costs a quarter of the head's forward pass.
    if weighting.detached:
        passed_back = ("nll", "logsumexp") if z_loss else ("nll",)
    else:
        passed_back = TokenStatistics._fields

    def split(tree):
        # Row r goes to micro-batch r mod A: each device keeps its rows.
        return jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1), tree
        )

    def gather(trained, batch):
        if accumulation == 1:
            return statistics(trained, batch)
        _, parts = jax.lax.scan(lambda _, micro: ((), statistics(trained, micro)), (), split(batch))
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)

    def add_up(value_and_grad, trained, micro_batches):
        """The sum of (gradients, parts) over the micro-batches."""

        def add(sums, micro):
            one = value_and_grad(trained, *micro)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, one), None

        first = jax.tree.map(lambda x: x[0], micro_batches)
        shapes = jax.eval_shape(value_and_grad, trained, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        return jax.lax.scan(add, zeros, micro_batches)[0]

    def gradients(trained, batch, state, step, models=None):
        references = {name: gather(other, batch).nll for name, other in (models or {}).items()}

        if accumulation == 1:

            def loss(trained):
                return loss_of_statistics(
                    statistics(trained, batch), batch, references, state, step
                )

            grads, (metrics, state) = jax.grad(loss, has_aux=True)(trained)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics, state

        if not weighting.uses_statistics:
            weights_BT, totals, state, extra = settle(None, batch, references, state, step)

            def part(trained, micro, weights):
                stats = statistics(trained, micro)
                return token_loss(stats, weights, micro["weights"], totals, z_loss)

            part_and_grad = jax.grad(part, has_aux=True)
            grads, parts = add_up(part_and_grad, trained, split((batch, weights_BT)))
            return grads, parts | extra, state

        slopes, (metrics, state) = jax.grad(loss_of_statistics, has_aux=True)(
            gather(trained, batch), batch, references, state, step
        )

        def part(trained, micro, slopes):
            stats = statistics(trained, micro)
            terms = [masked_sum(getattr(slopes, f), getattr(stats, f)) for f in passed_back]
            return sum(terms), ()

        grads, _ = add_up(jax.grad(part, has_aux=True), trained, split((batch, slopes)))
        return grads, metrics, state

    return gradients


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    weighting: Weighting,
    config: ConfigDict,
    quantized: Quantized | None = None,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch) -> (state, metrics): gradients, clipping, update, or skip.

    A step is skipped, which keeps the old state but for its counters, when its loss or gradient is
    not finite, when all weights are zero, or when the gradient norm is above spike_factor times
    its moving average. Metrics are float32 scalars. With `quantized` it is a step of the quantized
    phase; the two phases are two programs.
    """
    c = config.train
    gradients = make_gradients(
        make_statistics(model, config.objective.block_size, quantized),
        weighting,
        z_loss=config.objective.z_loss,
        accumulation=c.accumulation,
    )

    def train_step(state, batch):
        models = {name: state.ema for name in weighting.references if name == EMA_REFERENCE}
        grads, metrics, weighting_state = gradients(
            state.trained, batch, state.weighting, state.step, models
        )
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & (metrics["weight_sum"] != 0)
        counted = state.step - state.skipped
        if c.spike_factor:
            calm = norm <= c.spike_factor * state.norm_mean
            good &= calm | (counted < _NORM_WARMUP)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        ema = (
            jax.tree.map(
                lambda old, new: c.ema_decay * old + (1 - c.ema_decay) * new, state.ema, trained
            )
            if c.ema_decay
            else ()
        )
        # 1 - memory^n corrects for the start at 0 in the first steps.
        memory = jnp.minimum(_NORM_MEMORY, counted / (counted + 1.0))
        new = state._replace(
            trained=trained,
            optimizer=optimizer_state,
            ema=ema,
            weighting=weighting_state,
            skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row),
            norm_mean=memory * state.norm_mean + (1 - memory) * norm,
        )
        old = state._replace(skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
        # Select, do not multiply by zero: 0 * NaN is NaN.
        state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        state = state._replace(step=old.step + 1)
        metrics |= {
            "grad_norm": norm,
            "learning_rate": schedule(counted),
            "skipped_steps": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return state, metrics

    return train_step


def make_begin_quantized(
    optimizer: optax.GradientTransformation, quantized: Quantized, config: ConfigDict
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
            moments = optax.tree.set(optimizer.init(trained), _of_schedule, count=count)
        ema = rescaled(state.ema) if config.train.ema_decay else ()
        return state._replace(trained=trained, optimizer=moments, ema=ema)

    return begin


def _of_schedule(path, value) -> bool:
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"


def make_eval_step(
    model: Model, block_size: int, quantized: Quantized | None = None
) -> Callable[..., dict[str, jax.Array]]:
    """(trained, batch) -> sums over the batch: w * nll, w, w * bytes.

    With `quantized`, "quantized_nll" as well: w * nll with the weights on their grids.
    """
    statistics = make_statistics(model, block_size)
    on_grid = make_statistics(model, block_size, quantized)

    def eval_step(trained, batch):
        w_BT = batch["weights"]
        sums = {
            "nll": masked_sum(w_BT, statistics(trained, batch).nll),
            "weight": jnp.sum(w_BT),
            "bytes": masked_sum(w_BT, batch["num_bytes"].astype(jnp.float32)),
        }
        if quantized is not None:
            sums["quantized_nll"] = masked_sum(w_BT, on_grid(trained, batch).nll)
        return sums

    return eval_step
