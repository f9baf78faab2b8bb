"""Quantization after training: round to nearest, and GPTQ from a Hessian of calibration inputs.

I  inputs of a matrix (contraction axis; the "columns" of the GPTQ paper)
O  output channels
K  inputs in a block that is worked on at a time
T  calibration tokens
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from objectives.quantization.base import Grid, Quantizer

# The best floors of RSQ's importance without and with a rotation, from a summary of the paper.
RSQ_SMALLEST, RSQ_SMALLEST_ROTATED = 0.1, 0.01


class GPTQ(NamedTuple):
    """Result of `gptq` on one matrix.

    Attributes:
      weights: [I, O] float32, on the grid; equal to quantizer.decode(codes, grid).
      codes: [I, O] uint8.
      grid: scales (and zeros) as `Quantizer.grid` has them.
      loss: 0.5 tr((W - Q)^T H (W - Q)) with the damped H and the matrix that was quantized (rows of
        inputs that never occur being zero): what the greedy steps add up to, a scalar.
      unrounded: [I, O] float32: each input as it was before it was rounded, the errors of those
        before it made up for; `codes` are those of these weights.
    """

    weights: jax.Array
    codes: jax.Array
    grid: Grid
    loss: jax.Array
    unrounded: jax.Array


def round_to_nearest(weights: jax.Array, quantizer: Quantizer) -> jax.Array:
    """The quantizer applied once, with the scale that it starts from; [..., I, O]."""
    return quantizer.quantize(weights, quantizer.init(weights))


def calibration_hessian(
    inputs: jax.Array, importance: jax.Array | None = None, form: str = "linear"
) -> jax.Array:
    """H = 2 sum_t a_t x_t x_t^T, [I, I] float32; the sum over batches is that of their results.

    `gptq` does not depend on H's overall factor, so means and sums give the same (its official code
    keeps a mean over sequences).

    Args:
      inputs: [..., T, I], what the matrix is multiplied with.
      importance: [..., T], r of RSQ (arXiv 2503.01820); None counts every token once.
      form: RSQ's code ("linear") has a_t = r_t / mean r with the mean over the T axis; its paper
        ("squared", from a summary) a_t = r_t^2.

    Raises:
      ValueError: another form.
    """
    if form not in ("linear", "squared"):
        raise ValueError(f'form must be "linear" or "squared"; got {form!r}')
    x_TI = inputs.astype(jnp.float32)
    left_TI = x_TI
    if importance is not None:
        r_T = importance.astype(jnp.float32)
        a_T = jnp.square(r_T) if form == "squared" else r_T / r_T.mean(-1, keepdims=True)
        left_TI = x_TI * a_T[..., None]
    return 2 * jnp.einsum("...ti,...tj->ij", left_TI, x_TI, precision="highest")


def rsq_importance(scores: jax.Array, smallest: float = 0.01) -> jax.Array:
    """Scores [..., T] mapped linearly to [smallest, 1], over each T (RSQ, arXiv 2503.01820).

    The paper's score is the attention that a token receives, summed over heads and queries. Its
    best `smallest` is 0.01 after a rotation of the model and 0.1 without (from a summary).
    """
    low, high = scores.min(-1, keepdims=True), scores.max(-1, keepdims=True)
    return smallest + (scores - low) / jnp.where(high > low, high - low, 1) * (1 - smallest)


def gptq(
    weights: jax.Array,
    hessian: jax.Array,
    quantizer: Quantizer,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
) -> GPTQ:
    """GPTQ (arXiv 2210.17323 and its official code) of one matrix: rounding errors of an input are
    made up for by the inputs that come after it.

    With H damped by damping * mean(diag H), and U upper triangular, H^-1 = U^T U, for i = 1..I

      q_i = Q(w_i),   e = (w_i - q_i) / U_ii,   w_j -= U_ij e for j >= i

    Inputs that never occur (H_ii = 0) get H_ii = 1 and w_i = 0. If H is diagonal this is rounding
    to nearest. The result does not depend on `block_size`, which is about speed alone.

    Args:
      weights: [I, O].
      hessian: [I, I], of `calibration_hessian`.
      quantizer: any with contraction_axis=-2. Scales are those of the original matrix; in groups
        they are taken from the updated weights when a group's turn comes (nvfp4's outer scale then
        is that of the group).
      damping: share of the mean diagonal that is added to the diagonal.
      act_order: inputs in order of falling diag H instead of their own.
      static_groups: scales of groups from the original matrix, too.
      block_size: K, for granularities other than moving groups.

    Returns:
      GPTQ; NaN where H is too ill-conditioned for its Cholesky factor (raise `damping`).

    Raises:
      ValueError: shapes that do not fit, a quantizer of tables, or act_order with moving groups.
    """
    moving = quantizer.granularity == "group" and not static_groups
    _check_gptq(weights, hessian, quantizer, moving, act_order)
    inputs = weights.shape[0]
    w_IO, h_II = _damped(weights, hessian, damping)
    grid = quantizer.grid(w_IO, quantizer.init(w_IO))

    order_I = jnp.arange(inputs)
    if act_order:
        order_I = jnp.argsort(-jnp.diagonal(h_II))
        w_IO, h_II = w_IO[order_I], h_II[order_I][:, order_I]

    block = min(quantizer.group_size if moving else block_size, inputs)
    # Padding is an input of its own that nothing depends on: zero weights, an identity Hessian.
    padding = -inputs % block
    rows = jnp.pad(jnp.arange(inputs) // (inputs // grid.scale.shape[0]), (0, padding))
    if act_order:
        rows = rows.at[:inputs].set(rows[order_I])
    v_IO = jnp.pad(w_IO, ((0, padding), (0, 0)))
    u_II = jnp.eye(inputs + padding).at[:inputs, :inputs].set(_inverse_factor(h_II))

    def one_block(v_IO, start):
        v_KO = jax.lax.dynamic_slice_in_dim(v_IO, start, block)
        u_KI = jax.lax.dynamic_slice_in_dim(u_II, start, block)
        u_KK = jax.lax.dynamic_slice_in_dim(u_KI, start, block, axis=1)
        if moving:
            own = quantizer.grid(v_KO, quantizer.init(v_KO))
            in_block = jax.tree.map(lambda a: jnp.broadcast_to(a, (block, a.shape[1])), own)
        else:
            own = grid
            rows_K = jax.lax.dynamic_slice_in_dim(rows, start, block)
            in_block = jax.tree.map(lambda a: a[rows_K], grid)

        def one_input(v_KO, i):
            of_input = jax.tree.map(lambda a: a[i][None], in_block)
            codes_1O = quantizer.encode(v_KO[i][None], of_input)
            error_O = (v_KO[i] - quantizer.decode(codes_1O, of_input)[0]) / u_KK[i, i]
            # Row i itself becomes q_i: rows before it have U = 0.
            return v_KO - u_KK[i][:, None] * error_O, (codes_1O[0], error_O, v_KO[i])

        _, (codes_KO, error_KO, before_KO) = jax.lax.scan(one_input, v_KO, jnp.arange(block))
        later_KI = jnp.where(jnp.arange(u_II.shape[0]) >= start + block, u_KI, 0)
        v_IO = v_IO - jnp.einsum("ki,ko->io", later_KI, error_KO, precision="highest")
        return v_IO, (codes_KO, before_KO, own, 0.5 * jnp.square(error_KO).sum())

    starts = jnp.arange(0, inputs + padding, block)
    _, (codes, before, grids, losses) = jax.lax.scan(one_block, v_IO, starts)
    back_I = jnp.argsort(order_I)
    codes_IO, before_IO = (x.reshape(-1, v_IO.shape[1])[back_I] for x in (codes, before))
    grid = jax.tree.map(lambda a: a[:, 0], grids) if moving else grid
    return GPTQ(quantizer.decode(codes_IO, grid), codes_IO, grid, losses.sum(), before_IO)


def _check_gptq(weights, hessian, quantizer, moving, act_order) -> None:
    if weights.ndim != 2 or hessian.shape != (weights.shape[0],) * 2:
        raise ValueError(
            f"weights must be [I, O] and hessian [I, I]; got {weights.shape} and {hessian.shape}"
        )
    if quantizer.contraction_axis != -2:
        raise ValueError("gptq needs a quantizer with contraction_axis=-2")
    if moving and act_order:
        raise ValueError("act_order needs static_groups: in its order groups are not contiguous")


def _damped(weights_IO, hessian_II, damping) -> tuple[jax.Array, jax.Array]:
    """Weights and Hessian in float32, without inputs that never occur, and damped."""
    h_II = hessian_II.astype(jnp.float32)
    dead_I = jnp.diagonal(h_II) == 0
    h_II = h_II + jnp.diag(dead_I.astype(jnp.float32))
    w_IO = jnp.where(dead_I[:, None], 0.0, weights_IO.astype(jnp.float32))
    return w_IO, h_II + damping * jnp.diagonal(h_II).mean() * jnp.eye(len(h_II))


def _inverse_factor(h_II: jax.Array) -> jax.Array:
    """Upper triangular U with H^-1 = U^T U, without forming H^-1.

    With rows and columns reversed, H = L L^T becomes H = M M^T with M upper triangular: U = M^-1.
    """
    m_II = jnp.linalg.cholesky(h_II[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(m_II, jnp.eye(h_II.shape[0], dtype=h_II.dtype))
