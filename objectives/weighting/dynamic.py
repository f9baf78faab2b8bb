"""Dynamic loss-based reweighting of samples, by a softmax over the batch."""

import math

import jax
import jax.numpy as jnp

from objectives.weighting.base import (
    Weighting,
    check_name,
    check_number,
    multiply,
    stateless,
)
from objectives.weighting.samples import find_samples, sample_means, spread

_STRATEGIES = {
    "lin_upper": lambda h, delta: jnp.minimum(h + delta, delta),
    "quadratic": lambda h, delta: 1 - jnp.square(h / delta),
    "extremes": lambda h, delta: jnp.abs(h),
}


def dynamic(
    strategy: str = "lin_upper",
    temperature: float = 1.0,
    delta: float = 1.0,
    burn_in: int = 0,
    initial_temperature: float = 100.0,
    anneal_steps: int = 0,
    anneal: str = "step",
) -> Weighting:
    """w = d * n * softmax over the n samples of f(h(l_i)) / r.

    l_i is the mean loss of sample i (weighted by d), and

      h = delta * (2 l_i - max l - min l) / max(max l - min l, 1e-6), in [-delta, delta]
      lin_upper  f = min(h + delta, delta)   quadratic  f = 1 - h^2 / delta^2   extremes  f = |h|

    Dynamic loss-based reweighting (arXiv 2502.06733, and its released code), over the global,
    accumulated batch. A sample is a document, by `batch["sample_ids"]`, whole or cut. Under
    normalisation `kept` samples count by their share of the tokens, as in the released code; under
    `sequence` the loss is the paper's sum_i w_i l_i. r = infinity is cross-entropy.

    Args:
      strategy: lin_upper | quadratic | extremes.
      temperature: the last r, above 0; 1 for small models of the paper and 0.4 for large ones.
      delta: half the range of h, above 0; 1 in the paper.
      burn_in: steps with r = infinity before anything else; 1,000 of 20,000 in the paper.
      initial_temperature: r of the first `anneal_steps` steps.
      anneal_steps: length of the annealing; 0 is none.
      anneal: "step" holds `initial_temperature` and then jumps (r = 100 for 2,000 steps in
        fms-fsdp); "geometric" falls along a straight line of log r, which is ours: the paper's
        README says to anneal, not how.

    Raises:
      ValueError: a hyper-parameter outside of its range.
    """
    check_name("strategy", strategy, tuple(_STRATEGIES))
    check_name("anneal", anneal, ("step", "geometric"))
    check_number("temperature", temperature, above=0)
    check_number("delta", delta, above=0)
    check_number("burn_in", burn_in, least=0)
    check_number("anneal_steps", anneal_steps, least=0)
    check_number("initial_temperature", initial_temperature, above=0)
    if anneal_steps and anneal == "geometric" and not math.isfinite(temperature):
        raise ValueError(f"temperature={temperature} must be finite for anneal='geometric'")

    def temperature_at(step):
        if not anneal_steps:
            return temperature
        if anneal == "step":
            return jnp.where(step < anneal_steps, initial_temperature, temperature)
        done = jnp.clip(step / anneal_steps, 0.0, 1.0)
        first, last = math.log(initial_temperature), math.log(temperature)
        return jnp.exp(first + done * (last - first))

    def weigh(statistics, batch, references, state, step):
        samples = find_samples(batch)
        live_N = samples.live_N
        nll_BT = jax.lax.stop_gradient(statistics.nll)
        (loss_N,) = sample_means(samples, batch["weights"], nll_BT)
        low = jnp.min(loss_N, where=live_N, initial=jnp.inf)
        high = jnp.max(loss_N, where=live_N, initial=-jnp.inf)
        h_N = delta * (2 * loss_N - high - low) / jnp.maximum(high - low, 1e-6)
        f_N = _STRATEGIES[strategy](h_N, delta)
        # The inverse is finite where the temperature is not, and so can be written down.
        inverse = jnp.where(step < burn_in, 0.0, 1 / temperature_at(step))
        share_N = jnp.exp((f_N - jnp.max(f_N, where=live_N, initial=-jnp.inf)) * inverse)
        mean = jnp.sum(share_N, where=live_N) / jnp.sum(live_N)
        weights_BT = multiply(batch, spread(samples, share_N / mean))
        return weights_BT, state, {"dynamic_inverse_temperature": inverse}

    return Weighting(stateless, weigh, uses_statistics=True, batch_keys=("sample_ids",))
