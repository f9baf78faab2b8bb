"""One optimizer step and one evaluation step, as pure functions to be jitted.

A micro-batches, B rows, T tokens, D width, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.compression.phases import Quantized
from lm.model.attention import block_ids
from lm.model.trained import Trained
from lm.model.transformer import Model
from lm.parallel import sharded_loss
from lm.references.sources import ATTENTION, EMA
from lm.training.state import TrainState
from objectives import losses
from objectives.losses import Loss
from objectives.token_loss import denominators, masked_sum, token_loss
from objectives.vocabulary import products
from objectives.weighting import Weighting, weight_metrics

# The moving average of the gradient norm that defines a spike.
_NORM_MEMORY = 0.99
_NORM_WARMUP = 20

# The reference that a distillation learns from.
TEACHER = "teacher"


class SecondModel(NamedTuple):
    """A model that is compared with: how it is read, and what was trained of it.

    Attributes:
      forward: see `make_forward`.
      statistics: see `make_statistics`.
      softcap: of its logits.
      trained: what both functions take.
    """

    forward: Callable[..., Any]
    statistics: Callable[..., Any]
    softcap: float
    trained: Trained


class AttentiveStatistics(NamedTuple):
    """`LossStatistics`, and at each position the last layer's attention to the prompt [B, T]."""

    nll: jax.Array
    logsumexp: jax.Array
    entropy: jax.Array
    log_probability: jax.Array
    loss: jax.Array
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
    model: Model,
    quantized: Quantized | None = None,
    block_length: int = 0,
    attention: bool = False,
) -> Callable[..., tuple[jax.Array, ...]]:
    """(trained, batch) -> hidden states [B, T, D] and the output matrix [D, V].

    In full precision, or with weights on their grids when `quantized` is given. With a
    `block_length`, attention is cut into blocks of so many tokens. With `attention` there is a
    third result, the share of the last layer's that goes to the prompt [B, T] (see `Model.apply`).
    """

    def forward(trained, batch):
        params, options = trained.params, {}
        if quantized is not None:
            params = quantized.outer(trained)
            options = {"product": quantized.product, "scales": trained.scales["layers"]}
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        if block_length:
            options["blocks"] = block_ids(*inputs[1:], block_length)
        if not attention:
            return model.apply(params, *inputs, **options), model.head(params)
        options["attention_to"] = prompt_tokens(batch)
        hidden_BTD, share_BT = model.apply(params, *inputs, **options)
        return hidden_BTD, model.head(params), share_BT

    return forward


def make_statistics(
    model: Model,
    block_size: int,
    quantized: Quantized | None = None,
    loss: Loss = losses.CROSS_ENTROPY,
) -> Callable[..., Any]:
    """(trained, batch) -> per-token statistics [B, T] of what the model predicts.

    The model, then its head, in blocks; the loss decides what distribution they make.
    """
    forward = make_forward(model, quantized, loss.block_length)

    def statistics(trained, batch):
        inputs = losses.Inputs(
            *forward(trained, batch),
            batch["targets"],
            trained.loss,
            model.config.logit_softcap,
            block_size,
        )
        return sharded_loss.statistics(loss, inputs)

    return statistics


def make_loss_statistics(
    model: Model,
    block_size: int,
    quantized: Quantized | None = None,
    loss: Loss = losses.CROSS_ENTROPY,
    *,
    attention: bool = False,
) -> Callable[..., Any]:
    """(trained, batch, teacher=None) -> the same with the loss of each token, as `statistics.loss`.

    The batch holds the "keys" of a random loss; `teacher` is a `SecondModel`. With `attention` they
    are `AttentiveStatistics`.
    """
    forward = make_forward(model, quantized, loss.block_length, attention)

    def statistics(trained, batch, teacher=None):
        hidden_BTD, head_DV, *share = forward(trained, batch)
        inputs = losses.Inputs(
            hidden_BTD,
            head_DV,
            batch["targets"],
            trained.loss,
            model.config.logit_softcap,
            block_size,
            batch.get("keys"),
        )
        if teacher is not None:
            taught = teacher.forward(teacher.trained, batch)
            inputs = inputs._replace(teacher=losses.Teacher(*taught, products(teacher.softcap)))
        found = sharded_loss.loss_statistics(loss, inputs, batch["weights"])
        if not attention:
            return found
        return AttentiveStatistics(*found[:4], found.loss, *share)

    return statistics


def token_keys(seed: int, step: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A random key for each token, [B, T], that depends on seed, step, row and position alone.

    So that a resumed run, and one on other devices or with other micro-batches, draws the same.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    rows_B, positions_T = (jnp.arange(size) for size in shape)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, positions_T)


def make_gradients(
    statistics: Callable[..., Any],
    weighting: Weighting,
    *,
    z_loss: float,
    accumulation: int,
    reduce: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[..., Any]:
    """(trained, batch, weighting state, step, models) -> (gradients, metrics, weighting state).

    The loss is that of `objectives.token_loss` over the whole batch, whatever the number of
    micro-batches, and so are the statistics that a weighting takes of the batch. (A mean of
    micro-batch means is another loss as soon as their weights differ.)

    With one micro-batch the weights are computed inside its only forward pass. With more, weights
    and denominators are settled on the whole batch first; where they or the loss (by `reduce`, see
    `objectives.losses.Loss`) need statistics of it, a forward pass of its own gathers them,
    micro-batch by micro-batch, and the gradient of the loss in the gathered [B, T] arrays is what
    the micro-batches then pass back. Gradients are added in float32.

    What the weighting compares with is in the batch under its name where it is stored with the
    data. `models` maps the names of other references to a `SecondModel`, whose losses they hold: a
    forward pass more for each model. The one named "teacher" is what `statistics` is called with.
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
        value, parts = token_loss(
            statistics_BT, weights_BT, batch["weights"], totals, z_loss, reduce
        )
        return value, (parts | extra, state)

    def passed_back(slopes):
        """The statistics that a gradient comes back through.

        To leave the entropy out is not only to multiply it by zero: it costs a quarter of the
        head's forward pass.
        """
        if not weighting.detached:
            return slopes._fields
        return ("loss", "logsumexp") if z_loss else ("loss",)

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
        models = models or {}
        references = gather_references(batch, models)
        taught = statistics
        if TEACHER in models:
            taught = functools.partial(statistics, teacher=models[TEACHER])

        if accumulation == 1:

            def loss(trained):
                return loss_of_statistics(taught(trained, batch), batch, references, state, step)

            grads, (metrics, state) = jax.grad(loss, has_aux=True)(trained)
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics, state

        if not (weighting.uses_statistics or reduce or ATTENTION in weighting.references):
            weights_BT, totals, state, extra = settle(None, batch, references, state, step)

            def part(trained, micro, weights):
                stats = taught(trained, micro)
                return token_loss(stats, weights, micro["weights"], totals, z_loss)

            part_and_grad = jax.grad(part, has_aux=True)
            grads, parts = add_up(part_and_grad, trained, split((batch, weights_BT)))
            return grads, parts | extra, state

        slopes, (metrics, state) = jax.grad(loss_of_statistics, has_aux=True)(
            gather(taught, trained, batch), batch, references, state, step
        )

        def part(trained, micro, slopes):
            stats = taught(trained, micro)
            names = passed_back(slopes)
            terms = [masked_sum(getattr(slopes, name), getattr(stats, name)) for name in names]
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
    *,
    loss: Loss = losses.CROSS_ENTROPY,
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
    # The average is read as the model is; second models are plain, see `References.restore`. No
    # attention is cut: what a model is compared with is itself, or another, as a whole.
    whole = loss._replace(block_length=0)
    read = {
        EMA: (
            make_forward(model, quantized),
            make_statistics(model, block_size, quantized, whole),
            model.config.logit_softcap,
        )
    }
    for source, one in (second_models or {}).items():
        read[source] = make_forward(one), make_statistics(one, block_size), one.config.logit_softcap
    gradients = make_gradients(
        make_loss_statistics(
            model, block_size, quantized, loss, attention=ATTENTION in weighting.references
        ),
        weighting,
        z_loss=config.objective.z_loss,
        accumulation=c.accumulation,
        reduce=loss.reduce,
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
        if loss.random:
            batch = {**batch, "keys": token_keys(c.seed, state.step, batch["targets"].shape)}
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
    model: Model,
    block_size: int,
    quantized: Quantized | None = None,
    loss: Loss = losses.CROSS_ENTROPY,
) -> Callable[..., dict[str, jax.Array]]:
    """(trained, batch) -> sums over the batch: w * nll, w, w * bytes.

    The nll is that of the distribution which `loss` predicts, whatever is minimised. With
    `quantized`, "quantized_nll" as well: w * nll with the weights on their grids.
    """
    statistics = make_statistics(model, block_size, None, loss)
    on_grid = make_statistics(model, block_size, quantized, loss)

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
