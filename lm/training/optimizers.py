"""Optimizers from Optax, one for each kind of parameter; their state is float32."""

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
    """The optimizer of the `optimizer` section.

    Clipping by global norm, then AdamW, Lion or Muon (Muon for matrices, AdamW for the rest), with
    decoupled weight decay on all parameters of the model but vectors (norm scales and biases). With
    quantization.relative_scale_steps the step of a quantizer's scale is multiplied by the scale,
    and always by quantization.scale_rate.
    Moments and updates are float32, whatever the dtype of the parameters.

    Args:
      config: of the run.
      phases: its steps, which the schedule is made for.
      trained: what is trained, or its shapes.
      loss_learning_rate: peak learning rate of the parameters of the loss; 0 is the model's.

    Returns:
      The transformation, and the learning rate by step (of the matrices, with Muon).

    Raises:
      InputError: an unknown name, a number out of range, or a parameter of no known kind.
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
    # The state of a run without adapters has no entry for them.
    if "adapter" in jax.tree.leaves(groups.params):
        transforms["adapter"] = decayed
    if loss_learning_rate:
        rates["learning_rate"] = make_phase_schedule(config, phases, loss_learning_rate)
        transforms["loss"] = rule(**rates, weight_decay=0.0)
    clip = _clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    optimizer = optax.chain(clip, optax.partition(transforms, groups))
    relative, rate = config.quantization.relative_scale_steps, config.quantization.scale_rate
    if relative or rate != 1:
        optimizer = _scale_steps(optimizer, relative, rate)
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
    """g * min(1, limit / |g|) with the norm of all gradients, as `optax.clip_by_global_norm`.

    Optax divides every gradient by the norm. A product with one factor takes less memory traffic:
    XLA computes it where it is used, instead of storing quotients.
    """

    def clip(grads, params):
        del params
        factor = jnp.minimum(1.0, limit / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)


def _scale_steps(
    optimizer: optax.GradientTransformation, relative: bool, rate: float
) -> optax.GradientTransformation:
    """Multiplies the update u of a quantizer's scale: u * rate * |scale|, or u * rate.

    The steps of Adam and Lion do not depend on the size of a gradient, and so not on the gradient
    factor of LSQ: they are the learning rate, which may be more than a tenth of a scale. Relative
    steps at the rates of weights are small, 2e-5 of a scale, so that scales may need another rate.
    """

    def update(grads, state, trained):
        updates, state = optimizer.update(grads, state, trained)
        scales = jax.tree.map(
            lambda u, scale: u * rate * (abs(scale) if relative else 1.0),
            updates.scales,
            trained.scales,
        )
        return updates._replace(scales=scales), state

    return optax.GradientTransformation(optimizer.init, update)
