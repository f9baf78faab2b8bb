"""Cross-entropy of a language model's head, token by token, without a [B, T, V] array.

The logits of a large vocabulary are the largest array of a training step. Here they exist one block
of the vocabulary at a time: the forward pass accumulates a maximum, a log-sum-exp and an entropy
over the blocks, and the backward pass computes each block of logits again instead of keeping it
(Cut Cross-Entropy, arXiv 2411.09009; no gradient filtering and no vocabulary sorting: exact). With
a block size of 0 there are no blocks, and every derivative is JAX's own.

Shape suffixes:
    B  sequences in the batch
    T  positions in a sequence
    D  width of the hidden state
    V  vocabulary
    K  one block of the vocabulary
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from objectives.vocabulary import (
    DEFAULT_BLOCK_SIZE,
    Scores,
    add_gradients,
    first_column,
    for_each_block,
    not_finite,
    products,
    total,
)


class TokenStatistics(NamedTuple):
    """Statistics of the predicted distribution at every token: float32 [B, T], in nats.

    With logits z, p = softmax(z) and target y:
      nll: -log p_y, the loss of the token.
      logsumexp: log sum_j exp(z_j); its square is the z-loss.
      entropy: -sum_j p_j log p_j, of the whole predicted distribution.
      log_probability: log p_y = -nll.
      other_loss: what is minimised of the token where that is not nll; None where it is.
      teacher_divergence: KL(q || p) of p from a teacher's q, None without one; no gradient.
      teacher_agreement: 1 where p and q have the same largest entry, else 0; as above.
      value: the return that a value head expects from here, None without such a head.
    """

    nll: jax.Array
    logsumexp: jax.Array
    entropy: jax.Array
    log_probability: jax.Array
    other_loss: jax.Array | None = None
    teacher_divergence: jax.Array | None = None
    teacher_agreement: jax.Array | None = None
    value: jax.Array | None = None

    @property
    def loss(self) -> jax.Array:
        """What is minimised of every token."""
        return self.nll if self.other_loss is None else self.other_loss


@jax.named_scope("token_statistics")
def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    softcap: float = 0.0,
    scores: Scores | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    axis: str | None = None,
) -> TokenStatistics:
    """Per-token loss, log-sum-exp and entropy of softmax(hidden @ head), with exact gradients.

    z = hidden @ head, and z = c tanh(hidden @ head / c) with c = `softcap` > 0. Then

      nll       = logsumexp(z) - z_y           d nll / d z_j       = p_j - [j = y]
      logsumexp = log sum_j exp(z_j)           d logsumexp / d z_j = p_j
      entropy   = logsumexp(z) - sum_j p_j z_j d entropy / d z_j   = -p_j (log p_j + entropy)

    and the soft-cap multiplies each of them by 1 - (z_j / c)^2.

    A token whose cotangents are all zero (weight 0, not a target) contributes exactly zero to both
    gradients, even if its hidden state or its logits are NaN or infinite. Its statistics are NaN
    all the same, so select before any arithmetic: with x = where(weights != 0, statistic, 0),
    weights * x and weights * x**2 are safe, while where(weights != 0, x**2, 0) of a NaN x is not
    (its cotangent is 0 * 2x = NaN).

    With `block_size` = 0 all logits exist at once and every derivative is JAX's own: forward mode
    (`jax.jvp`), Hessian products and derivatives of any order work. A token with logits that are
    not finite then has the statistics NaN and contributes exactly zero to every derivative.

    Products are formed in the promoted dtype of hidden and head and summed in float32; all
    statistics, and the sums over tokens behind the gradient of the head, are float32. With
    bfloat16 inputs expect values and gradients within 1e-2 (relative to the largest entry) of the
    float32 computation on the same inputs; the rounding of dz to bfloat16 is what remains.

    Temporary memory of value and gradients is about 2.5 float32 arrays [B, T, block_size], 3.5
    with gradients through the entropy. In bfloat16 XLA on CPU converts around each slice and also
    keeps a float32 copy of the whole head.

    With an `axis` the vocabulary is spread over the devices of a mapped axis, in order and in equal
    parts. Each device passes over its own part. The maximum over devices is one all-reduce of a
    [B, T] array; the sums and the target's logit, relative to it, are another of four. The
    statistics are those of the whole vocabulary, identical on each device. The gradient of the head
    is that of the device's part, the gradient of the hidden states is the contribution of this
    part. Contributions are summed over the axis where `jax.lax.pcast` has marked as varying an
    array that is identical on all devices. The mapping is `jax.shard_map` with `check_vma`, under
    which JAX refuses hidden states or a head that do not vary over the axis; without the check
    gradients would be wrong.

    Args:
      hidden: [B, T, D] float32 or bfloat16, the states in front of the head.
      head: [D, V] float32 or bfloat16, any V >= 1; the block need not divide it.
      targets: [B, T] integers in [0, V), of the whole vocabulary. Outside of it, nll and
        log_probability are NaN.
      softcap: bound c of the logits; 0 means none. A Python number.
      scores: a function of both that gives other logits than hidden @ head. The statistics are
        those of the softmax of these logits, and gradients are exact.
      block_size: columns of the head per block, one of which may be smaller; 0 is plain automatic
        differentiation of all logits at once. A Python integer.
      axis: name of the mapped axis that the vocabulary is spread over; None is a whole vocabulary.

    Returns:
      TokenStatistics of [B, T] float32 arrays. Differentiable in hidden and head: in reverse mode,
      once; with `block_size` = 0 in every mode, any number of times.

    Raises:
      ValueError: shapes that do not fit together, a dtype other than those above, a negative or
        infinite `softcap`, a `softcap` beside `scores`, a negative `block_size`.
    """
    _check_arguments(hidden, head, targets, softcap, block_size)
    if scores is not None and softcap:
        raise ValueError(f"softcap={softcap} is of products, not of other scores")
    targets = targets - first_column(head, axis)
    static = _Static(scores or products(softcap), block_size, axis)
    if not block_size:
        return _plain_statistics(static.scores, hidden, head, targets, axis)
    nll_BT, logsumexp_BT, entropy_BT = _statistics(static, hidden, head, targets)
    return TokenStatistics(nll_BT, logsumexp_BT, entropy_BT, -nll_BT)


def _check_arguments(hidden, head, targets, softcap, block_size) -> None:
    if hidden.ndim != 3 or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(
            f"hidden must be [B, T, D] and head [D, V]; got {hidden.shape} and {head.shape}"
        )
    if targets.shape != hidden.shape[:2]:
        raise ValueError(
            f"targets must be [B, T] = {hidden.shape[:2]}, as hidden is; got {targets.shape}"
        )
    if head.shape[1] < 1:
        raise ValueError("head has an empty vocabulary")
    for name, array in (("hidden", hidden), ("head", head)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} must be float32 or bfloat16; got {array.dtype}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers; got {targets.dtype}")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be 0 (none) or a positive number; got {softcap}")
    if block_size < 0:
        raise ValueError(f"block_size must be 0 (all at once) or above; got {block_size}")


class _Static(NamedTuple):
    scores: Scores
    block_size: int
    axis: str | None


class Partial(NamedTuple):
    """Statistics of a part of the vocabulary; `merge` of two parts is that of their union.

    Sums are taken relative to the part's own maximum m, so that neither large logits overflow nor
    nll and entropy lose digits to a large log-sum-exp.
    """

    maximum: jax.Array  # m = max_j z_j
    sum_exp: jax.Array  # sum_j exp(z_j - m)
    sum_exp_shifted: jax.Array  # sum_j exp(z_j - m) (z_j - m)
    target_logit: jax.Array  # z_y, NaN where the target is not in this part


def merge(a: Partial, b: Partial) -> Partial:
    """The statistics of the union of two parts."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    shift_a, shift_b = a.maximum - maximum, b.maximum - maximum
    scale_a, scale_b = jnp.exp(shift_a), jnp.exp(shift_b)
    return Partial(
        maximum,
        scale_a * a.sum_exp + scale_b * b.sum_exp,
        scale_a * (a.sum_exp_shifted + a.sum_exp * shift_a)
        + scale_b * (b.sum_exp_shifted + b.sum_exp * shift_b),
        jnp.where(jnp.isnan(a.target_logit), b.target_logit, a.target_logit),
    )


def merge_over(axis: str, part: Partial) -> Partial:
    """`merge` of the parts of all devices of a mapped axis."""
    maximum = lax.pmax(part.maximum, axis)
    shift = part.maximum - maximum
    scale = jnp.exp(shift)
    here = ~jnp.isnan(part.target_logit)
    sum_exp, sum_exp_shifted, target_logit, found = total(
        (
            scale * part.sum_exp,
            scale * (part.sum_exp_shifted + part.sum_exp * shift),
            jnp.where(here, part.target_logit, 0.0),
            here.astype(jnp.float32),
        ),
        axis,
    )
    return Partial(maximum, sum_exp, sum_exp_shifted, jnp.where(found > 0, target_logit, jnp.nan))


def block_statistics(logits_BTK, targets_BT) -> Partial:
    """Statistics of one block; targets count from the block's first column."""
    maximum_BT = lax.stop_gradient(logits_BTK.max(-1))
    shifted_BTK = logits_BTK - maximum_BT[..., None]
    exp_BTK = jnp.exp(shifted_BTK)
    last = logits_BTK.shape[-1] - 1
    inside_BT = (targets_BT >= 0) & (targets_BT <= last)
    at_target_BT = jnp.take_along_axis(
        logits_BTK, jnp.clip(targets_BT, 0, last)[..., None], axis=-1
    )[..., 0]
    return Partial(
        maximum_BT,
        exp_BTK.sum(-1),
        (exp_BTK * shifted_BTK).sum(-1),
        jnp.where(inside_BT, at_target_BT, jnp.nan),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(static, hidden_BTD, head_DV, targets_BT):
    def add_block(partial, head_DK, start):
        logits_BTK = static.scores.logits(hidden_BTD, head_DK)
        block = block_statistics(logits_BTK, targets_BT - start)
        return block if partial is None else merge(partial, block)

    partial = for_each_block(head_DV, static.block_size, add_block, None)
    if static.axis:
        partial = merge_over(static.axis, partial)
    return finish(partial)


def finish(partial: Partial):
    """nll, logsumexp and entropy from the sums over the whole vocabulary."""
    log_sum_BT = jnp.log(partial.sum_exp)
    nll_BT = log_sum_BT + (partial.maximum - partial.target_logit)
    logsumexp_BT = log_sum_BT + partial.maximum
    entropy_BT = log_sum_BT - partial.sum_exp_shifted / partial.sum_exp
    return nll_BT, logsumexp_BT, entropy_BT


def _plain_statistics(scores, hidden_BTD, head_DV, targets_BT, axis) -> TokenStatistics:
    """The statistics by plain automatic differentiation of all logits at once."""
    bad_BT = not_finite(scores, hidden_BTD, head_DV, axis)
    # Both: the product has the gradient d logits @ head, and 0 * inf is NaN.
    logits_BTV = scores.logits(jnp.where(bad_BT[..., None], 0, hidden_BTD), head_DV)
    logits_BTV = jnp.where(bad_BT[..., None], 0, logits_BTV)
    partial = block_statistics(logits_BTV, targets_BT)
    if axis:
        partial = merge_over(axis, partial)
    nll_BT, logsumexp_BT, entropy_BT = (
        jnp.where(bad_BT, jnp.nan, x_BT) for x_BT in finish(partial)
    )
    return TokenStatistics(nll_BT, logsumexp_BT, entropy_BT, -nll_BT)


def _statistics_forward(static, hidden, head, targets):
    arrays = hidden.value, head.value, targets.value
    outputs = _statistics(static, *arrays)
    _, logsumexp_BT, entropy_BT = outputs
    return outputs, (*arrays, logsumexp_BT, entropy_BT)


def _statistics_backward(static, residuals, cotangents):
    hidden_BTD, head_DV, targets_BT, logsumexp_BT, entropy_BT = residuals
    # The gradient of the entropy is seldom asked for, and asking keeps its sums in the forward
    # pass, which costs time and doubles its memory. A symbolic zero leaves all of it out.
    through_entropy = not isinstance(cotangents[2], SymbolicZero)
    d_nll_BT, d_logsumexp_BT, d_entropy_BT = (
        jnp.zeros_like(logsumexp_BT) if isinstance(cotangent, SymbolicZero) else cotangent
        for cotangent in cotangents
    )
    live_BT = (d_nll_BT != 0) | (d_logsumexp_BT != 0) | (d_entropy_BT != 0)
    hidden_BTD = jnp.where(live_BT[..., None], hidden_BTD, 0)
    d_probability_BT = d_nll_BT + d_logsumexp_BT
    if through_entropy:
        d_probability_BT -= d_entropy_BT * entropy_BT

    def add_block(gradients, head_DK, start):
        logits_BTK = static.scores.logits(hidden_BTD, head_DK)
        log_p_BTK = logits_BTK - logsumexp_BT[..., None]
        slope_BTK = d_probability_BT[..., None]
        if through_entropy:
            slope_BTK = slope_BTK - d_entropy_BT[..., None] * log_p_BTK
        is_target_BTK = (targets_BT - start)[..., None] == jnp.arange(head_DK.shape[1])
        dz_BTK = jnp.exp(log_p_BTK) * slope_BTK - jnp.where(is_target_BTK, d_nll_BT[..., None], 0)
        block = static.scores.pull_back(hidden_BTD, head_DK, logits_BTK, dz_BTK, live_BT)
        return add_gradients(gradients, block, start)

    dhidden_BTD, dhead_DV = for_each_block(
        head_DV, static.block_size, add_block, (None, jnp.zeros_like(head_DV))
    )
    # A second time, for a head that is not finite: 0 * inf is NaN.
    dhidden_BTD = jnp.where(live_BT[..., None], dhidden_BTD, 0)
    return dhidden_BTD.astype(residuals[0].dtype), dhead_DV, None


_statistics.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)
