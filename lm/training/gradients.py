"""The gradient of an objective: in one pass, in micro-batches, or in two passes.

A micro-batches, B rows, T tokens.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.training.forward import ReferenceModel
from objectives import Objective
from objectives.terms import masked_sum, minimise

# (trained, batch) -> (token statistics, aux)
Statistics = Callable[..., Any]
# (trained, batch, references, state, step) -> (gradients, metrics, state)
Gradients = Callable[..., tuple[Any, dict[str, jax.Array], Any]]


def make_gradients(
    statistics: Statistics, objective: Objective, accumulation: int = 1
) -> Callable[..., tuple[Any, dict[str, jax.Array], Any]]:
    """(trained, batch, state, step, models) -> (gradients, metrics, state of the objective).

    What is minimised is that of the whole batch, whatever the number of micro-batches; gradients
    are added in float32. There are three ways:

      plain        one micro-batch: `prepare` and `terms` read its only forward pass.
      accumulated  the objective needs no statistics of the whole batch: `prepare` runs first, then
                   every micro-batch adds the gradient of its terms.
      two passes   it does: a forward pass of its own gathers them, micro-batch by micro-batch, and
                   the gradient in the gathered [B, T] arrays is what micro-batches then pass back.

    References are stored with the data and in the batch under their names, or the losses of a
    `ReferenceModel` in `models`, by name; each model costs a forward pass. Those that are the
    objective's teachers are given to `statistics`.

    Metrics: "loss", each other term, and those of `prepare`; "weight_sum" is that of the data
    unless `prepare` gives another.
    """
    if accumulation == 1:
        make = plain
    else:
        make = two_pass if objective.whole_batch else accumulated
        make = functools.partial(make, accumulation=accumulation)

    def gradients(trained, batch, state, step, models=None):
        models = models or {}
        references = gather_references(objective.references, batch, models, accumulation)
        taught = statistics
        if objective.teachers:
            teachers = {name: models[name] for name in objective.teachers}
            taught = functools.partial(statistics, teachers=teachers)
        grads, metrics, state = make(taught, objective)(trained, batch, references, state, step)
        return grads, {"weight_sum": jnp.sum(batch["weights"])} | metrics, state

    return gradients


def plain(statistics: Statistics, objective: Objective) -> Gradients:
    """The gradient of a batch that is one micro-batch."""

    def gradients(trained, batch, references, state, step):
        def loss(trained):
            return _loss(objective, statistics(trained, batch), batch, references, state, step)

        grads, (metrics, state) = jax.grad(loss, has_aux=True)(trained)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), metrics, state

    return gradients


def accumulated(statistics: Statistics, objective: Objective, accumulation: int) -> Gradients:
    """The sum of the gradients of micro-batches whose denominators are known before."""

    def gradients(trained, batch, references, state, step):
        prepared = objective.prepare(None, {}, batch, references, state, step)

        def loss(trained, micro, rows):
            found, aux = statistics(trained, micro)
            terms = objective.terms(found, aux, micro, prepared._replace(rows=rows))
            return minimise(terms)

        micro_batches = split((batch, prepared.rows), accumulation)
        grads, values = add_up(jax.grad(loss, has_aux=True), trained, micro_batches)
        return grads, {**values, **prepared.metrics}, prepared.state

    return gradients


def two_pass(statistics: Statistics, objective: Objective, accumulation: int) -> Gradients:
    """The gradient of an objective that reads the statistics of all micro-batches at once."""

    def gradients(trained, batch, references, state, step):
        gathered = gather(statistics, trained, batch, accumulation)

        def loss(gathered):
            return _loss(objective, gathered, batch, references, state, step)

        slopes, (metrics, state) = jax.grad(loss, has_aux=True)(gathered)

        def passed_back(trained, micro, slopes):
            (found, aux), (d_found, d_aux) = statistics(trained, micro), slopes
            names = [name for name in objective.differentiated if getattr(found, name) is not None]
            pairs = [(getattr(d_found, name), getattr(found, name)) for name in names]
            pairs += zip(jax.tree.leaves(d_aux), jax.tree.leaves(aux), strict=True)
            return sum(masked_sum(slope, x) for slope, x in pairs), ()

        grad = jax.grad(passed_back, has_aux=True)
        grads, _ = add_up(grad, trained, split((batch, slopes), accumulation))
        return grads, metrics, state

    return gradients


def _loss(objective, found_and_aux, batch, references, state, step):
    """What is minimised of a whole batch, and (metrics, state)."""
    found, aux = found_and_aux
    prepared = objective.prepare(found, aux, batch, references, state, step)
    value, values = minimise(objective.terms(found, aux, batch, prepared))
    return value, ({**values, **prepared.metrics}, prepared.state)


def split(tree: Any, accumulation: int) -> Any:
    """Arrays [B, ...] as [A, B / A, ...]: row r goes to micro-batch r mod A.

    In this order each device keeps its rows.
    """
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1), tree
    )


def gather(compute: Callable[..., Any], trained: Any, batch: Any, accumulation: int) -> Any:
    """compute(trained, batch), micro-batch by micro-batch; arrays [B, ...] in the order of rows."""
    if accumulation == 1:
        return compute(trained, batch)
    micro_batches = split(batch, accumulation)
    _, parts = jax.lax.scan(lambda _, micro: ((), compute(trained, micro)), (), micro_batches)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def add_up(value_and_grad: Callable[..., Any], trained: Any, micro_batches: Any) -> Any:
    """The float32 sum of (gradients, values) over the micro-batches."""

    def add(sums, micro):
        one = value_and_grad(trained, *micro)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, one), None

    first = jax.tree.map(lambda x: x[0], micro_batches)
    shapes = jax.eval_shape(value_and_grad, trained, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, micro_batches)[0]


def gather_references(
    names: tuple[str, ...],
    batch: Mapping[str, jax.Array],
    models: Mapping[str, ReferenceModel],
    accumulation: int,
) -> dict[str, jax.Array]:
    """The losses [B, T] of the named references: of their models, or as the batch has them."""
    references, of_model = {}, {}
    for name in names:
        if name in models:
            model = models[name]
            # Two references to one model are one forward pass.
            if id(model) not in of_model:
                of_model[id(model)] = gather(
                    lambda trained, micro, of=model: of.statistics(trained, micro).nll,
                    model.trained,
                    batch,
                    accumulation,
                )
            references[name] = of_model[id(model)]
        elif name in batch:
            references[name] = batch[name]
    return references
