"""Scales that clip the largest weights where the others gain more by it.

I  contraction (input) axis          G, K, O  blocks, inputs in a block, output channels
"""

import jax
import jax.numpy as jnp

from objectives.quantization.base import Grid, Layout, Quantizer

# Grids of a step times integers, or with a learned scale: their `grid` of p * w is p times as wide.
SEARCHED = ("absmax", "minmax", "lsq", "seq", "ternary", "learned_range")


def searched(quantizer: Quantizer, *, steps: int = 80, power: float = 2.4) -> Quantizer:
    """The same grid with the scale of least error, found by shrinking.

    For i = 0, ..., steps - 1 and p = 1 - i/100 the scale that the quantizer takes from p * w is
    tried on w, and each block keeps the one with the least sum |Q(w) - w|^power. That is the "mse"
    option of GPTQ's official code (arXiv 2210.17323) and the clip search of RSQ's (2503.01820),
    with 80 steps and that power in both. The least error is never above that of the quantizer.

    A learned scale begins with what is found (`init`); a scale that is read from the weights is
    found at every call, and the gradient of a weight then passes unchanged.

    Args:
      quantizer: absmax, minmax, lsq, seq, ternary or learned_range.
      steps: shrinkings that are tried, 1 to 100; 1 is the quantizer itself.
      power: of the errors.

    Raises:
      ValueError: another quantizer or number of steps.
    """
    if quantizer.name not in SEARCHED:
        raise ValueError(f"{quantizer.name} has no search; valid: {', '.join(SEARCHED)}")
    if not 1 <= steps <= 100:
        raise ValueError(f"steps={steps} must be from 1 to 100")
    layout = Layout(quantizer.granularity, quantizer.group_size, quantizer.contraction_axis)

    def find(weights):
        w_IO = weights.astype(jnp.float32)

        def candidate(i):
            shrunk_IO = (1 - i / 100) * w_IO
            grid = quantizer.grid(shrunk_IO, quantizer.init(shrunk_IO))
            rounded_IO = quantizer.decode(quantizer.encode(w_IO, grid), grid)
            # |x|^power; XLA on CPU has vector instructions for exp and log, and none for pow.
            error_GKO = layout.split(jnp.exp2(power * jnp.log2(jnp.abs(rounded_IO - w_IO))))
            return layout.squeeze(layout.reduce(jnp.sum, error_GKO)), grid

        def better(i, best):
            error, grid = candidate(i)
            take = error < best[0]
            kept = (
                jnp.where(take, new, old)
                for new, old in zip(grid, best[1], strict=True)
                if new is not None
            )
            return jnp.minimum(error, best[0]), Grid(*kept)

        return jax.lax.fori_loop(1, steps, better, candidate(0))[1]

    if jax.tree.leaves(jax.eval_shape(quantizer.init, jnp.zeros((layout.group_size or 1,) * 2))):
        return quantizer._replace(init=lambda weights: quantizer.of_grid(find(weights)))

    def on_grid(weights):
        grid = find(weights)
        return quantizer.decode(quantizer.encode(weights, grid), grid).astype(weights.dtype)

    straight_through = jax.custom_jvp(on_grid)
    straight_through.defjvps(lambda tangent, on_grid, weights: tangent)

    def inside(weights, scale=()):
        del scale
        w_GKO, step = layout.split(weights), layout.expand(find(weights).scale)
        distance_GKO = jnp.abs(layout.split(on_grid(weights)) - w_GKO)
        return layout.merge(distance_GKO <= 0.5001 * step)

    return quantizer._replace(
        quantize=lambda weights, scale=(): straight_through(weights),
        grid=lambda weights, scale=(): find(weights),
        inside=inside,
    )
