"""Optimizers, from Optax; every parameter belongs to a group or is an error."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.compression.phases import Phases
from lm.errors import InputError
from lm.model.config import check_choice
from lm.model.parameters import parameter_kinds
from lm.model.trained import Trained
from lm.training.schedules import make_phase_schedule

# MuonDimensionNumbers of a matrix stacked over layers, [L, in, out]. Without them Optax takes a
# three-dimensional leaf for no matrix and silently gives it to Adam.
_STACKED = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)


def make_optimizer(
    config: ConfigDict, phases: Phases, trained: Trained, loss_learning_rate: float = 0.0
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of the `optimizer` section for what is trained (or its shapes).

    Clipping by global norm, then AdamW, Lion or Muon (Muon for matrices, AdamW for the rest), with
    decoupled weight decay on all but vectors (norm scales, biases, all that is no model parameter).
    The step of a quantizer's scale is that times the scale, with quantization.relative_scale_steps.
    Parameters of the loss have the schedule with `loss_learning_rate` as its peak, if it is not 0.

    Returns:
      The transformation and the schedule of its (matrix) learning rate.
    """
    c = config.optimizer
    check_choice("optimizer.name", c.name, ("adamw", "lion", "muon"))
    for key in ("peak_learning_rate", "adam_learning_rate"):
        if c[key] <= 0:
            raise InputError(f"optimizer.{key}={c[key]} must be above 0")
    for key in ("beta1", "beta2", "momentum"):
        if not 0 <= c[key] < 1:
            raise InputError(f"optimizer.{key}={c[key]} must be at least 0 and below 1")
    for key in ("weight_decay", "clip_norm"):
        if c[key] < 0:
            raise InputError(f"optimizer.{key}={c[key]} must be 0 or above")
    groups = Trained(
        parameter_kinds(trained.params),
        jax.tree.map(lambda _: "vector", trained.scales),
        jax.tree.map(lambda _: "loss" if loss_learning_rate else "vector", trained.loss),
    )
    schedule = make_phase_schedule(config, phases, c.peak_learning_rate)
    rates = {"learning_rate": schedule, "b1": c.beta1, "b2": c.beta2}
    matrix = None
    if c.name == "muon":
        rates["learning_rate"] = make_phase_schedule(config, phases, c.adam_learning_rate)
        matrix = optax.contrib.muon(
            schedule,
            beta=c.momentum,
            weight_decay=c.weight_decay,
            muon_weight_dimension_numbers=lambda masked: jax.tree.map(lambda _: _STACKED, masked),
        )
    rule = optax.lion if c.name == "lion" else optax.adamw
    decayed, plain = (rule(**rates, weight_decay=decay) for decay in (c.weight_decay, 0.0))
    transforms = {
        "matrix": matrix or decayed,
        "embedding": decayed,
        "head": decayed,
        "vector": plain,
    }
    if loss_learning_rate:
        rates["learning_rate"] = make_phase_schedule(config, phases, loss_learning_rate)
        transforms["loss"] = rule(**rates, weight_decay=0.0)
    clip = _clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    optimizer = optax.chain(clip, optax.partition(transforms, groups))
    if config.quantization.relative_scale_steps:
        optimizer = _relative_scales(optimizer)
    return _in_float32(optimizer), schedule


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on float32 views of its parameters.

    Its moments are float32 from the start, and so are its updates: `optax.apply_updates` adds them
    in float32 and rounds once to the dtype of a parameter.
    """

    def init(trained):
        return optimizer.init(optax.tree.cast(trained, jnp.float32))

    def update(grads, state, trained):
        grads, trained = (optax.tree.cast(tree, jnp.float32) for tree in (grads, trained))
        return optimizer.update(grads, state, trained)

    return optax.GradientTransformation(init, update)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """g * min(1, limit / |g|), of the norm of all gradients: `optax.clip_by_global_norm`.

    Optax divides every gradient by the norm; XLA on CPU writes the quotients down before it makes
    moments of them, but computes a product anew where it is used.
    """

    def clip(grads, params):
        del params
        factor = jnp.minimum(1.0, limit / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)


def _relative_scales(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes the update u of a quantizer's scale relative: u * |scale|.

    Adam and Lion take no notice of the size of a gradient, and so not of the gradient factor of LSQ
    either: their step is the learning rate, which may be more than a tenth of a scale.
    """

    def update(grads, state, trained):
        updates, state = optimizer.update(grads, state, trained)
        scales = jax.tree.map(lambda u, scale: u * abs(scale), updates.scales, trained.scales)
        return updates._replace(scales=scales), state

    return optax.GradientTransformation(optimizer.init, update)
