"""Importance of tokens by quantization-aware integrated gradients (QIG, arXiv 2603.17809).

B rows, T tokens, D width.

The paper and its official code differ; both are here, by name:

  "weights"      the code's path for quantized weights: from an input of zeros to x, of
                 F = sum_t mean_h |block(x)_th - block_q(x)_th|.
  "activations"  its path for quantized weights and activations: from x_q, the input in the
                 quantized stream, to x, of the same F. (The code's factor of 1000 in F cancels.)
  "paper"        the paper's formula (from a summary): from x_q to x, of block itself. A gradient
                 needs one number: it is of the sum of the outputs, which is ours, unconfirmed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

FORMS = ("weights", "activations", "paper")
RULES = ("mean", "trapezoid")

Block = Callable[[jax.Array], jax.Array]


def integrated_gradients(
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    baseline: jax.Array,
    points: int = 32,
    rule: str = "mean",
) -> jax.Array:
    """(x - x0) * integral over a from 0 to 1 of the gradient of f at x0 + a (x - x0), elementwise.

    Its sum is f(x) - f(x0) up to the error of the rule (completeness). For a linear f one point is
    exact.

    Args:
      function: f, from an array like x to a scalar.
      x: of any shape.
      baseline: x0, of the same shape.
      points: at a = 0, ..., 1, equally far apart; 0 alone for one.
      rule: "mean" weighs all points alike, as the code of QIG does; "trapezoid" the two ends half.

    Raises:
      ValueError: no points, or another rule.
    """
    if points < 1:
        raise ValueError(f"points must be at least 1; got {points}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}; got {rule!r}")
    weight = jnp.ones(points)
    if rule == "trapezoid" and points > 1:
        weight = weight.at[jnp.array([0, -1])].set(0.5)
    x, baseline = x.astype(jnp.float32), baseline.astype(jnp.float32)
    gradient = jax.grad(function)

    def add(total, point):
        share, a = point
        return total + share * gradient(baseline + a * (x - baseline)), None

    places = weight / weight.sum(), jnp.linspace(0.0, 1.0, points)
    total, _ = jax.lax.scan(add, jnp.zeros_like(x), places)
    return (x - baseline) * total


def quantization_gradients(
    block: Block,
    block_q: Block,
    x: jax.Array,
    x_q: jax.Array | None = None,
    *,
    form: str = "weights",
    points: int = 32,
    rule: str = "mean",
) -> jax.Array:
    """The QIG of every input of a block, [B, T, D] float32.

    Args:
      block: x -> outputs [B, T, D] in full precision.
      block_q: the same with quantized weights; not used by the form "paper".
      x: inputs [B, T, D].
      x_q: inputs in the quantized stream; not used by the form "weights".
      form: one of `FORMS`, see the module. The code takes "weights" with 32 points and equal
        weights.
      points: of `integrated_gradients`.
      rule: of the same.

    Raises:
      ValueError: another form, or a form that needs `x_q` without it.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}; got {form!r}")
    if form != "weights" and x_q is None:
        raise ValueError(f"the form {form!r} needs the inputs of the quantized stream")

    def difference(x):
        y, y_q = block(x).astype(jnp.float32), block_q(x).astype(jnp.float32)
        # The slope of |d| at 0, which all of d is at an input of zeros, is 0 as in the code; that
        # of `jnp.abs` is 1.
        return ((y - y_q) * jax.lax.stop_gradient(jnp.sign(y - y_q))).mean(-1).sum()

    def output(x):
        return block(x).astype(jnp.float32).sum()

    baseline = jnp.zeros_like(x) if form == "weights" else x_q
    function = output if form == "paper" else difference
    return integrated_gradients(function, x, baseline, points, rule)


def token_importance(
    attributions: jax.Array, valid: jax.Array | None = None, clip: bool = True
) -> jax.Array:
    """Weights of tokens that are at least 0 and sum to 1 over each sequence, [B, T] float32.

      s_t = mean_h |QIG_th|,  clipped to [Q1 - 1.5 (Q3 - Q1), Q3 + 1.5 (Q3 - Q1)] with the quartiles
      Q1 and Q3 of s over the tokens of the sequence;  lambda_t = s_t / sum_t s_t

    The code clips in its path "weights" and does not in its path "activations"; the paper clips.
    A sequence whose importances are all 0 gets equal weights.

    Args:
      attributions: [B, T, D], of `quantization_gradients`.
      valid: bool [B, T]; other tokens (padding) get 0 and do not count in the quartiles. A
        sequence without any valid token gets 0 everywhere.
      clip: whether to clip.
    """
    s_BT = jnp.abs(attributions.astype(jnp.float32)).mean(-1)
    valid_BT = jnp.ones(s_BT.shape, bool) if valid is None else valid
    if clip:
        known_BT = jnp.where(valid_BT, s_BT, jnp.nan)
        low_B1, high_B1 = jnp.nanquantile(known_BT, jnp.array([0.25, 0.75]), axis=-1, keepdims=True)
        reach_B1 = 1.5 * (high_B1 - low_B1)
        s_BT = jnp.clip(s_BT, low_B1 - reach_B1, high_B1 + reach_B1)
    s_BT = jnp.where(valid_BT, s_BT, 0.0)
    total_B1 = s_BT.sum(-1, keepdims=True)
    count_B1 = jnp.maximum(valid_BT.sum(-1, keepdims=True), 1)
    equal_BT = valid_BT / count_B1
    return jnp.where(total_B1 > 0, s_BT / jnp.where(total_B1 > 0, total_B1, 1.0), equal_BT)
