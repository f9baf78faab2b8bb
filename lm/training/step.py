"""One optimizer step and one evaluation step, as pure functions to be jitted.

A micro-batches, B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.model.transformer import Model
from lm.training.quantized import Quantized
from lm.training.references import ATTENTION, EMA
from lm.training.state import Trained, TrainState
from objectives.cross_entropy import TokenStatistics, token_statistics
from objectives.token_loss import denominators, masked_sum, token_loss
from objectives.weighting import Weighting, weight_metrics

# The moving average of the gradient norm that defines a spike.
_NORM_MEMORY = 0.99
_NORM_WARMUP = 20


class SecondModel(NamedTuple):
    """A model that is compared with: how it is read, and what was trained of it.

    Attributes:
      forward: see `make_forward`.
      statistics: see `make_statistics`.
      trained: what both of them take.
    """

    forward: Callable[..., Any]
    statistics: Callable[..., Any]
    trained: Trained


class AttentiveStatistics(NamedTuple):
    """`TokenStatistics`, and at each position the last layer's attention to the prompt [B, T]."""

    nll: jax.Array
    logsumexp: jax.Array
    entropy: jax.Array
    log_probability: jax.Array
    attention: jax.Array


def prompt_tokens(batch: dict[str, jax.Array]) -> jax.Array:
    """Which tokens are the prompt of their segment, [B, T] bool.

    The first of a segment, which nothing predicts, and every token that is no target: the slot
    before it, of the same segment, has weight 0. In raw text that is the boundary alone, or what a
    segment begins with that goes on a document which a row's end has cut.
    """
    segments_BT = batch["segment_ids"]
    first_BT = (segments_BT != jnp.roll(segments_BT, 1, axis=1)).at[:, 0].set(True)
    return first_BT | (jnp.roll(batch["weights"], 1, axis=1) == 0)


def make_forward(
    model: Model, quantized: Quantized | None = None, attention: bool = False
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array | None]]:
    """(trained, batch) -> hidden states [B, T, D], the output matrix [D, V], attention [B, T].

    In full precision, or with weights on their grids when `quantized` is given. With `attention`,
    the share of the last layer's that goes to the prompt (see `Model.apply`), and else None.
    """

    def forward(trained, batch):
        params, options = trained.params, {}
        if quantized is not None:
            params = quantized.outer(trained)
            options = {"product": quantized.product, "scales": trained.scales["layers"]}
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        if not attention:
            return model.apply(params, *inputs, **options), model.head(params), None
        options["attention_to"] = prompt_tokens(batch)
        hidden_BTD, share_BT = model.apply(params, *inputs, **options)
        return hidden_BTD, model.head(params), share_BT

    return forward


def make_statistics(
    model: Model, block_size: int, quantized: Quantized | None = None, attention: bool = False
) -> Callable[..., Any]:
    """(trained, batch) -> per-token statistics [B, T]: the model, then its head, in blocks.

    They are `TokenStatistics`, or with `attention` `AttentiveStatistics`.
    """
    forward = make_forward(model, quantized, attention)

    def statistics(trained, batch):
        hidden_BTD, head_DV, attention_BT = forward(trained, batch)
        of_head = token_statistics(
            hidden_BTD,
            head_DV,
            batch["targets"],
            softcap=model.config.logit_softcap,
            block_size=block_size,
        )
        return AttentiveStatistics(*of_head, attention_BT) if attention else of_head

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

    What the weighting compares with is in the batch under its name where it is stored with the
    data. `models` maps the names of other references to a `SecondModel`, whose losses they hold: a
    forward pass more for each model.
    """

    def settle(statistics_BT, batch, references, state, step):
        """Weights and denominators of the whole batch, state and metrics of the weighting."""
        if isinstance(statistics_BT, AttentiveStatistics):
            references = references | {ATTENTION: statistics_BT.attention}
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

    def gather(statistics, trained, batch):
        if accumulation == 1:
            return statistics(trained, batch)
        _, parts = jax.lax.scan(lambda _, micro: ((), statistics(trained, micro)), (), split(batch))
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)

    def gather_references(batch, models):
        references, losses = {}, {}
        for name in weighting.references:
            if name in models:
                model = models[name]
                # Two references to one model are one forward pass.
                if id(model) not in losses:
                    losses[id(model)] = gather(
                        lambda trained, b, of=model: of.statistics(trained, b).nll,
                        model.trained,
                        batch,
                    )
                references[name] = losses[id(model)]
            elif name in batch:
                references[name] = batch[name]
        return references

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
        references = gather_references(batch, models or {})

        if accumulation == 1:

            def loss(trained):
                return loss_of_statistics(
                    statistics(trained, batch), batch, references, state, step
                )

            grads, (metrics, state) = jax.grad(loss, has_aux=True)(trained)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics, state

        if not (weighting.uses_statistics or ATTENTION in weighting.references):
            weights_BT, totals, state, extra = settle(None, batch, references, state, step)

            def part(trained, micro, weights):
                stats = statistics(trained, micro)
                return token_loss(stats, weights, micro["weights"], totals, z_loss)

            part_and_grad = jax.grad(part, has_aux=True)
            grads, parts = add_up(part_and_grad, trained, split((batch, weights_BT)))
            return grads, parts | extra, state

        slopes, (metrics, state) = jax.grad(loss_of_statistics, has_aux=True)(
            gather(statistics, trained, batch), batch, references, state, step
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
    second_models: Mapping[str, Model] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch, frozen) -> (state, metrics): gradients, clipping, update, or skip.

    `second_models` maps sources of `objective.references` to models; `frozen` maps the same sources
    to what was trained of them, and is {} by default.

    A step is skipped, which keeps the old state but for its counters, when its loss or gradient is
    not finite, when all weights are zero, or when the gradient norm is above spike_factor times
    its moving average. Metrics are float32 scalars. With `quantized` it is a step of the quantized
    phase; the two phases are two programs.
    """
    c = config.train
    block_size = config.objective.block_size
    # The average is read as the model is; second models are plain, see `References.restore`.
    read = {EMA: (make_forward(model, quantized), make_statistics(model, block_size, quantized))}
    for source, one in (second_models or {}).items():
        read[source] = make_forward(one), make_statistics(one, block_size)
    gradients = make_gradients(
        make_statistics(model, block_size, quantized, ATTENTION in weighting.references),
        weighting,
        z_loss=config.objective.z_loss,
        accumulation=c.accumulation,
    )

    def train_step(state, batch, frozen=None):
        of_source = {
            source: SecondModel(*read[source], trained)
            for source, trained in {EMA: state.ema, **(frozen or {})}.items()
        }
        models = {
            name: of_source[source]
            for name, source in config.objective.references.items()
            if source in of_source
        }
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
