"""What fewer bits for a matrix do to the loss, and to the next update of the weights (SNIP).

SNIP (arXiv 2602.01410) chooses formats by a normalised loss divergence dL and weight divergence dW
of every matrix and format, from norms that a training step and two steps with injected noise
collect. Its formulas are not public: those here are a reconstruction that is consistent with the
statistics it collects [derived], and no result of the paper is claimed for them. So are the size of
the noise and the weighting between dL and dW unconfirmed: callers choose them.

All functions are elementwise or of norms, on arrays of any shape.
"""

import jax
import jax.numpy as jnp


def loss_divergence(
    gradient_norm: jax.Array, error_norm: jax.Array, count: int, loss: jax.Array
) -> jax.Array:
    """dL = |g|_F |d|_F / sqrt(count) / L of a tensor with gradient g and rounding error d.

    That is E |<g, d>| / L, up to sqrt(2 / pi), for an error of random direction [derived]. Of a
    matrix whose inputs are quantized, too, it is the sum of the dL of both; inputs in one format,
    whatever the width of the weights, add the same number to all widths, which decides nothing.

    Args:
      gradient_norm: |g|_F of the loss.
      error_norm: |d|_F = |w - Q(w)|_F.
      count: numbers in the tensor.
      loss: L, to compare with.
    """
    return gradient_norm * error_norm / count**0.5 / loss


def adamw_jacobian(
    gradient: jax.Array,
    first: jax.Array,
    second: jax.Array,
    step: jax.Array | float,
    *,
    learning_rate: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> jax.Array:
    """J = dU / dg, elementwise, of AdamW's update U = lr mh / (sqrt(vh) + eps) in the gradient g.

      m = b1 m' + (1 - b1) g,  v = b2 v' + (1 - b2) g^2,  mh = m / (1 - b1^t),  vh = v / (1 - b2^t)
      J = lr ( (1 - b1) / ((1 - b1^t) (sqrt(vh) + eps))
               - mh (1 - b2) g / ((1 - b2^t) sqrt(vh) (sqrt(vh) + eps)^2) )

    It is 0 in its second part where vh is 0, where g is, too.

    Args:
      gradient: g.
      first: m', the first moment before the update, not corrected for its start at 0.
      second: v', the second.
      step: t, the number of the update, from 1; infinity is a state without start.
      learning_rate: lr.
      beta1: b1.
      beta2: b2.
      epsilon: eps.
    """
    late1, late2 = 1 - jnp.power(beta1, step), 1 - jnp.power(beta2, step)
    m = (beta1 * first + (1 - beta1) * gradient) / late1
    v = (beta2 * second + (1 - beta2) * jnp.square(gradient)) / late2
    root = jnp.sqrt(v)
    below = root + epsilon
    of_second = m * (1 - beta2) * gradient / (late2 * jnp.where(root > 0, root, 1) * below**2)
    return learning_rate * ((1 - beta1) / (late1 * below) - jnp.where(root > 0, of_second, 0))


def weight_divergence(
    response_norms: jax.Array, weight_norms: jax.Array, noise_norm: jax.Array, error_norm: jax.Array
) -> jax.Array:
    """dW = (sum over matrices m of |J_m dg_m|_F / |W_m|_F) |d|_F / |noise|_F.

    The change of the next update of every matrix, relative to the matrix, for the rounding error d
    of one of them, if gradients follow the error as they have followed the noise [derived].

    Args:
      response_norms: [..., M], |J_m dg_m|_F, with dg_m the change of the gradient of matrix m when
        noise is added to the one matrix.
      weight_norms: [..., M], |W_m|_F; a matrix of zeros does not count.
      noise_norm: |noise|_F.
      error_norm: |d|_F.
    """
    whole = jnp.where(weight_norms > 0, weight_norms, jnp.inf)
    return (response_norms / whole).sum(-1) * error_norm / noise_norm
