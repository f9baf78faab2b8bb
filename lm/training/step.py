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
from lm.training.state import TrainState
from objectives.cross_entropy import token_statistics
from objectives.token_loss import denominators, masked_sum, token_loss
from objectives.weighting import Weighting

# The moving average of the gradient norm that defines a spike.
_NORM_MEMORY = 0.99
_NORM_WARMUP = 20


def make_statistics(model: Model, block_size: int) -> Callable[..., Any]:
    """(parameters, batch) -> per-token statistics [B, T]: the model, then its head, in blocks."""

    def statistics(params, batch):
        hidden_BTD = model.apply(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        return token_statistics(
            hidden_BTD,
            model.head(params),
            batch["targets"],
            softcap=model.config.logit_softcap,
            block_size=block_size,
        )

    return statistics


def make_gradients(
    statistics: Callable[..., Any], weighting: Weighting, *, z_loss: float, accumulation: int
) -> Callable[..., Any]:
    """(params, batch, weighting state, step) -> (gradients, metrics, weighting state).

    The loss is that of `objectives.token_loss` over the whole batch, whatever the number of
    micro-batches: token weights and denominators are settled first, then the gradients of the
    micro-batches are added in float32. (A mean of micro-batch means is another loss as soon as
    their weights differ.)
    """

    def gradients(params, batch, weighting_state, step):
        weights_BT, weighting_state, extra = weighting.weigh(None, batch, {}, weighting_state, step)
        weights_BT = jax.lax.stop_gradient(weights_BT)
        totals = denominators(weights_BT, batch["weights"])

        def loss(params, micro, weights):
            return token_loss(statistics(params, micro), weights, micro["weights"], totals, z_loss)

        value_and_grad = jax.grad(loss, has_aux=True)
        if accumulation == 1:
            grads, parts = value_and_grad(params, batch, weights_BT)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        else:
            # Row r goes to micro-batch r mod A: each device keeps its rows.
            split = jax.tree.map(
                lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1),
                (batch, weights_BT),
            )

            def add(sums, micro):
                one = value_and_grad(params, *micro)
                return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, one), None

            shapes = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda x: x[0], split))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
            (grads, parts), _ = jax.lax.scan(add, zeros, split)
        return grads, parts | extra | {"weight_sum": totals.weight}, weighting_state

    return gradients


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    weighting: Weighting,
    config: ConfigDict,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch) -> (state, metrics): gradients, clipping, update, or skip.

    A step is skipped, which keeps the old state but for its counters, when its loss or gradient is
    not finite, when all weights are zero, or when the gradient norm is above spike_factor times
    its moving average. Metrics are float32 scalars.
    """
    c = config.train
    gradients = make_gradients(
        make_statistics(model, config.objective.block_size),
        weighting,
        z_loss=config.objective.z_loss,
        accumulation=c.accumulation,
    )

    def train_step(state, batch):
        grads, metrics, weighting_state = gradients(
            state.params, batch, state.weighting, state.step
        )
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & (metrics["weight_sum"] != 0)
        counted = state.step - state.skipped
        if c.spike_factor:
            calm = norm <= c.spike_factor * state.norm_mean
            good &= calm | (counted < _NORM_WARMUP)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = (
            jax.tree.map(
                lambda old, new: c.ema_decay * old + (1 - c.ema_decay) * new, state.ema, params
            )
            if c.ema_decay
            else ()
        )
        # 1 - memory^n corrects for the start at 0 in the first steps.
        memory = jnp.minimum(_NORM_MEMORY, counted / (counted + 1.0))
        new = state._replace(
            params=params,
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


def make_eval_step(model: Model, block_size: int) -> Callable[..., dict[str, jax.Array]]:
    """(params, batch) -> sums over the batch: w * nll, w, w * bytes; and the number of tokens."""
    statistics = make_statistics(model, block_size)

    def eval_step(params, batch):
        w_BT = batch["weights"]
        return {
            "nll": masked_sum(w_BT, statistics(params, batch).nll),
            "weight": jnp.sum(w_BT),
            "bytes": masked_sum(w_BT, batch["num_bytes"].astype(jnp.float32)),
        }

    return eval_step
