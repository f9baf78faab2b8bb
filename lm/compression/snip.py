"""SNIP's sensitivities of a model: divergences of the loss and of the weights.

I and O inputs and outputs of a matrix; n items, each one layer of one matrix, and p widths.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lm.compression.sensitivity import Sensitivity, Subject, gradients, leaves
from lm.parallel.in_turn import in_turn
from objectives.quantization import round_to_nearest
from objectives.quantization.snip import adamw_jacobian, loss_divergence, weight_divergence


def snip(
    weighting: float = 1.0,
    *,
    noise: float = 0.01,
    learning_rate: float = 0.002,
    beta1: float = 0.9,
    beta2: float = 0.98,
    epsilon: float = 1e-8,
    moments: tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]] | None = None,
    step: float = np.inf,
    seed: int = 0,
) -> Sensitivity:
    """dL + weighting * dW of SNIP (arXiv 2602.01410) in the form of `objectives.quantization.snip`.

    That form is a reconstruction [derived], not the paper's. dL takes one gradient of all batches;
    dW another for every item, with Gaussian noise added to its weights (the paper injects noise in
    one forward and one backward pass). Rounding errors are those of the weights alone.

    Args:
      weighting: between both; the paper's is not public. 0 saves the gradients with noise.
      noise: its standard deviation relative to the root mean square of the weights; the paper's is
        not public.
      learning_rate: of AdamW, as the rest: dW is in proportion to it. The defaults are those of the
        `optimizer` section.
      beta1: see `adamw_jacobian`.
      beta2: see there.
      epsilon: see there.
      moments: by path, before the update; None takes the means of g and of g^2 over the batches,
        where AdamW would settle with these weights (ours, for a model without its optimizer).
      step: number of the update.
      seed: of the noise.
    """

    def costs(subject):
        errors = _error_norms(subject, matrices_of(subject))
        at = subject if subject.point is None else subject._replace(params=subject.point)
        matrices = matrices_of(at)
        loss, gradient, settled = _mean_gradient(at, matrices)
        norms = {path: np.asarray(_layer_norms(g)) for path, g in gradient.items()}
        found = []
        for (path, layer), error_P in zip(subject.items(), errors, strict=True):
            size = matrices[path][0].size
            found.append(loss_divergence(norms[path][layer], error_P, size, loss))
        found = np.array(found, np.float64)
        if not weighting:
            return found
        options = {"learning_rate": learning_rate, "beta1": beta1, "beta2": beta2}
        first, second = moments or settled
        slope = {
            path: adamw_jacobian(g, first[path], second[path], step, epsilon=epsilon, **options)
            for path, g in gradient.items()
        }
        of_weights = _weight_divergences(at, gradient, slope, errors, noise, seed)
        return found + weighting * of_weights

    return costs


def matrices_of(subject: Subject) -> dict[str, jax.Array]:
    """The stacks that are planned, by path."""
    found = leaves(subject.params)
    return {path: found[path] for path in subject.paths}


def _mean_gradient(subject: Subject, matrices: dict[str, jax.Array]):
    """(mean loss, its gradient, (mean g, mean g^2) over the batches' own mean losses)."""
    find = gradients(subject.model)
    parts = in_turn(find(matrices, subject.params, batch) for batch in subject.batches)
    whole, settled, count = None, None, len(subject.batches)
    for nll, weight, gradient in parts:
        own = {path: (g / weight / count) for path, g in gradient.items()}
        squares = {path: jnp.square(g * count) / count for path, g in own.items()}
        settled = _sum(settled, (own, squares))
        whole = _sum(whole, (nll, weight, gradient))
    nll, weight, gradient = whole
    return nll / weight, {path: g / weight for path, g in gradient.items()}, settled


def _sum(total, tree):
    return tree if total is None else jax.tree.map(jnp.add, total, tree)


def _weight_divergences(subject, gradient, slope, errors, noise, seed) -> np.ndarray:
    """dW of every item and width, [n, p]; one gradient of all batches for each item."""
    find = gradients(subject.model)
    matrices = matrices_of(subject)
    weights = np.concatenate([_layer_norms(matrices[path]) for path in subject.paths])
    found = []
    for number, ((path, layer), error_P) in enumerate(zip(subject.items(), errors, strict=True)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        noisy, noise_norm = _add_noise(matrices[path], layer, noise, key)
        changed = {**matrices, path: noisy}
        parts = in_turn(find(changed, subject.params, batch) for batch in subject.batches)
        _, weight, total = functools.reduce(_sum, parts)
        response = _responses(total, weight, gradient, slope)
        response = np.concatenate([response[path] for path in subject.paths])
        found.append(weight_divergence(response, weights, noise_norm, error_P))
    return np.array(found, np.float64)


@jax.jit
def _responses(total, weight, gradient, slope):
    """|J_m dg_m| of every layer of every matrix, by path."""
    return {
        path: _layer_norms(slope[path] * (g / weight - gradient[path])) for path, g in total.items()
    }


@jax.jit
def _add_noise(leaf, layer, noise, key):
    """The stack with noise in one layer, and the norm of the noise as it was added."""
    w_IO = leaf[layer].astype(jnp.float32)
    size = noise * jnp.sqrt(jnp.square(w_IO).mean())
    noisy_IO = (w_IO + size * jax.random.normal(key, w_IO.shape)).astype(leaf.dtype)
    norm = jnp.linalg.norm(noisy_IO.astype(jnp.float32) - w_IO)
    return leaf.at[layer].set(noisy_IO), jnp.where(norm > 0, norm, 1.0)


def _error_norms(subject: Subject, matrices: dict[str, jax.Array]) -> np.ndarray:
    """|w - Q(w)|_F of every item at every width, [n, p]."""
    found = [
        np.stack([_stack_error(q, matrices[path]) for q in subject.quantizers(path)], axis=-1)
        for path in subject.paths
    ]
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _stack_error(quantizer, leaf):
    def error(w_IO):
        rounded_IO = round_to_nearest(w_IO, quantizer).astype(jnp.float32)
        return jnp.linalg.norm(w_IO.astype(jnp.float32) - rounded_IO)

    return jax.lax.map(error, leaf)


@jax.jit
def _layer_norms(leaf):
    return jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).sum((-2, -1)))
