"""Everything that a run carries from step to step, and that a checkpoint holds."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.model.interface import Model
from lm.model.trained import Trained
from lm.parallel.mesh import parameter_shardings, replicated
from lm.training.trainable import Trainable, split
from objectives import Objective
from objectives.losses import Loss


class TrainState(NamedTuple):
    """The state of training; one pytree, sharded, donated from step to step.

    Attributes:
      step: optimizer steps taken, skipped ones included.
      trained: what is trained.
      optimizer: state of the optimizer.
      ema: moving average of `trained` in float32, or () when it is off.
      objective: state of the objective.
      skipped: steps skipped so far.
      skipped_in_a_row: steps skipped since the last one that counted.
      norm_mean: moving average of the gradient norm over the steps that counted.
    """

    step: jax.Array
    trained: Trained
    optimizer: Any
    ema: Any
    objective: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    norm_mean: jax.Array


@functools.cache
def parameter_shapes(model: Model) -> Any:
    """Shapes of the parameters, without allocating anything."""
    return jax.eval_shape(model.init, jax.random.key(0))


def init_loss(model: Model, loss: Loss, key: jax.Array) -> Any:
    """Fresh parameters of the loss, from another key than the model's."""
    return loss.init(jax.random.fold_in(key, 1), model.config.vocab_size, model.config.width)


def make_init(
    model: Model,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    ema: bool,
    first_scales: Callable[[Any], Any] | None = None,
    trainable: Trainable = lambda path: True,
    packing: Callable[[Any], Any] = lambda params: params,
) -> Callable[..., TrainState]:
    """A function from a random key to a fresh TrainState, with given parameters or with fresh ones.

    Given parameters may lack some, such as adapters, which are then fresh. `trainable` says which
    have moments, `packing` makes of the parameters what is kept of them. `first_scales` gives the
    scales of these parameters; without it nothing is ever quantized.
    """

    def init(key: jax.Array, params: Any = None) -> TrainState:
        params = packing(_update(model.init(key), params or {}))
        trained = Trained(
            params,
            first_scales(params) if first_scales else (),
            init_loss(model, objective.loss, key),
        )
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            trained=trained,
            optimizer=optimizer.init(split(trained, trainable)[0]),
            ema=first_average(trained) if ema else (),
            objective=objective.init(),
            skipped=zero,
            skipped_in_a_row=zero,
            norm_mean=jnp.zeros((), jnp.float32),
        )

    return init


def _update(tree: Any, others: Any) -> Any:
    """A dictionary of dictionaries with some of its leaves replaced."""
    return {
        name: _update(part, others.get(name, {}))
        if isinstance(part, dict)
        else others.get(name, part)
        for name, part in tree.items()
    }


def first_average(trained: Trained) -> Trained:
    """The moving average at its start: a copy in float32.

    In bfloat16 it would hardly move: most steps change it by less than half of its last bit.
    """
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.float32, copy=True), trained)


def next_average(ema: Trained, trained: Trained, decay: float) -> Trained:
    """decay * ema + (1 - decay) * trained, in float32."""
    return jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * new.astype(jnp.float32), ema, trained
    )


def average_as_model(model: Model, ema: Trained) -> Trained:
    """A moving average in the dtypes that the model's forward pass expects of its parameters."""
    shapes = parameter_shapes(model)
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), ema.params, shapes)
    return ema._replace(params=params)


def check_unchanged(old: TrainState, new: TrainState) -> None:
    """Checks that a step has kept the dtypes and shapes of its state; call it while tracing.

    Otherwise the next step would be compiled again, and a checkpoint would not hold what the run
    went on with.

    Raises:
      TypeError: names the first leaf that has changed.
    """
    before, after = (dict(jax.tree_util.tree_leaves_with_path(state)) for state in (old, new))
    for keys in before | after:
        kinds = [
            f"{leaf.dtype}{list(leaf.shape)}" if leaf is not None else "nothing"
            for leaf in (before.get(keys), after.get(keys))
        ]
        if kinds[0] != kinds[1]:
            raise TypeError(
                f"a train step makes {kinds[1]} of state.{_name(keys).replace('/', '.')}, which is "
                f"{kinds[0]}"
            )


def state_shardings(mesh: Mesh, model: Model, state: Any) -> Any:
    """A sharding for every leaf: what mirrors a parameter lies like it, the rest is replicated.

    Scales mirror the axes that they have as long as their weights'.
    """
    shapes = parameter_shapes(model)
    of_params = parameter_shardings(mesh, shapes, model.axes())
    by_path = {
        _name(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes),
            jax.tree.leaves(of_params),
            strict=True,
        )
    }

    def place(path, leaf):
        for name, (shape, sharding) in by_path.items():
            if f"/{name}/" in _name(path) and leaf.ndim == len(shape):
                # The codes and scales of a packed matrix.
                sizes = dict(mesh.shape)
                axes = zip(leaf.shape, sharding.spec, strict=True)
                spec = [axis if size % _devices(sizes, axis) == 0 else None for size, axis in axes]
                return NamedSharding(mesh, PartitionSpec(*spec))
            if _name(path).endswith("/" + name) and leaf.ndim == len(shape):
                axes = zip(leaf.shape, shape, sharding.spec, strict=True)
                spec = [axis if size == full else None for size, full, axis in axes]
                return NamedSharding(mesh, PartitionSpec(*spec))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def _devices(sizes: dict[str, int], axis: Any) -> int:
    """Devices that an entry of a PartitionSpec spreads an axis over."""
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    return math.prod(sizes[name] for name in names)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
