"""What is minimised of a token: a function with the gradient of the policy, to be differentiated.

All map (ratio r, log p, advantage A, `Bounds`) to losses of the same shape. On-policy, where r = 1,
the gradient of each is that of -A log p.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from objectives.policy.clipping import Bounds

# (ratio, log p, advantage, bounds) -> loss
Surrogate = Callable[[jax.Array, jax.Array, jax.Array, Bounds], jax.Array]


def reinforce(
    ratio: jax.Array, log_p: jax.Array, advantage: jax.Array, bounds: Bounds
) -> jax.Array:
    """-A log p: the ratio is not read, as if all was drawn from the policy as it is."""
    del ratio, bounds
    return -advantage * log_p


def ppo(ratio: jax.Array, log_p: jax.Array, advantage: jax.Array, bounds: Bounds) -> jax.Array:
    """-min(r A, clip(r) A), and at most -c A where A < 0: PPO (arXiv 1707.06347), with dual clip.

    c is the dual bound (arXiv 1912.09729); a step is never larger than one with the ratio c.
    """
    del log_p
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, bounds.low, bounds.high) * advantage)
    dual = jnp.where(jnp.isfinite(bounds.dual), bounds.dual, 0.0) * advantage
    capped = (advantage < 0) & jnp.isfinite(bounds.dual)
    return -jnp.where(capped, jnp.maximum(gain, dual), gain)


def cispo(ratio: jax.Array, log_p: jax.Array, advantage: jax.Array, bounds: Bounds) -> jax.Array:
    """-sg[clip(r)] A log p: CISPO (arXiv 2506.13585), and MinPRO with its ratio.

    The ratio is a weight, so that a clipped token still has a gradient.
    """
    weight = lax.stop_gradient(jnp.clip(ratio, bounds.low, bounds.high))
    return -weight * advantage * log_p


def sapo(positive: float = 1.0, negative: float = 1.05) -> Surrogate:
    """-g(r) A with g(r) = 4 sigmoid(tau (r - 1)) / tau: SAPO, a soft gate in place of the clip.

    The slope of g is 1 at r = 1, so that the on-policy gradient is that of -A log p. Its value
    there is 2 / tau: the loss is not that of PPO.

    Args:
      positive: tau where A > 0.
      negative: tau elsewhere.
    """

    def surrogate(ratio, log_p, advantage, bounds):
        del log_p, bounds
        tau = jnp.where(advantage > 0, positive, negative)
        return -4 * jax.nn.sigmoid(tau * (ratio - 1)) / tau * advantage

    return surrogate


def clipped(
    name: str, ratio: jax.Array, advantage: jax.Array, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """Which tokens are clipped below and which above, booleans.

    Of PPO those whose gradient is lost: below with a negative advantage, above with a positive one,
    or above the dual bound with a negative one. Of CISPO all whose weight is clipped. Of others
    none.
    """
    below, above = ratio < bounds.low, ratio > bounds.high
    if name == "ppo":
        down = advantage < 0
        return below & down, (above & (advantage > 0)) | ((ratio > bounds.dual) & down)
    if name == "cispo":
        return below, above
    return jnp.zeros_like(below), jnp.zeros_like(above)


def make_surrogate(name: str, positive: float, negative: float) -> Surrogate:
    """The surrogate of a name in `SURROGATES`; the numbers are those of `sapo`."""
    named = {"reinforce": reinforce, "ppo": ppo, "cispo": cispo}
    return sapo(positive, negative) if name == "sapo" else named[name]


SURROGATES = ("reinforce", "ppo", "cispo", "sapo")
