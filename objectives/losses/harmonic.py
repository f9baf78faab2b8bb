"""Harmonic losses: a token is the likelier, the nearer its column of the head is.

B batch, T length, D width, K one block of the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from objectives.losses.base import Loss, Prediction, no_parameters
from objectives.vocabulary import Scores, differentiated
from objectives.weighting.base import check_name, check_number


def harmonic(
    distance: str = "euclidean",
    exponent: float = 0.0,
    epsilon: float = 1e-4,
    absolute: bool = False,
) -> Loss:
    """l = -log P_y, P_v proportional to (d_v + epsilon)^-n: logits z = -n log(d + epsilon).

    With hidden state x and column w of the head, its centre, d is

      euclidean    |x - w|^2 / D
      cosine       1 - x.w / (|x| |w|)
      bray_curtis  sum_i |x_i - w_i| / sum_i |x_i + w_i|
      mahalanobis  sum_i s_i (x_i - w_i)^2 / D, s = exp of a trained vector that starts at 0

    Euclidean: harmonic loss (arXiv 2502.01628), with an exponent of the squared distance; n of
    1, sqrt(D) and D were tried. Its further division of d by the smallest of the vocabulary is left
    out: it changes no probability. With epsilon = 0 no probability changes under (x, w) ->
    (c x, c w).

    The predicted distribution is P, in evaluation, sampling and the statistics of weightings, too.
    `bray_curtis` is no product of matrices and much slower than the others.

    UNCONFIRMED: the other distances are textbook forms (after arXiv 2603.10225, of which the
    stabilisers and exponents were not available); the diagonal of `mahalanobis` and that it is the
    squared distance which is raised to -n are ours.

    Args:
      distance: euclidean | cosine | bray_curtis | mahalanobis.
      exponent: n, of the distance (its square, for two of them); 0 is sqrt(D).
      epsilon: added to every distance.
      absolute: divide `bray_curtis` by sum_i (|x_i| + |w_i|), which keeps d in [0, 1].

    Raises:
      ValueError: an unknown distance, a negative number.
    """
    check_name("distance", distance, DISTANCES)
    check_number("exponent", exponent, least=0)
    check_number("epsilon", epsilon, least=0)

    def init(key, vocab_size, width):
        return {"log_precision": jnp.zeros((width,))}

    def predict(inputs):
        hidden_BTD, head_DV = inputs.hidden, inputs.head
        width = hidden_BTD.shape[-1]
        if distance == "mahalanobis":
            root_D = jnp.exp(inputs.params["log_precision"] / 2)
            hidden_BTD = (hidden_BTD * root_D).astype(hidden_BTD.dtype)
            head_DV = (head_DV * root_D[:, None]).astype(head_DV.dtype)
        plain = not inputs.block_size
        scores = _scores(distance, exponent or width**0.5, epsilon, absolute, plain)
        return Prediction(hidden_BTD, head_DV, scores)

    return Loss(
        init=init if distance == "mahalanobis" else no_parameters,
        predict=predict,
        prediction=f"harmonic, distance {distance}",
        softcapped=False,
    )


DISTANCES = ("euclidean", "cosine", "bray_curtis", "mahalanobis")


@functools.cache
def _scores(distance: str, exponent: float, epsilon: float, absolute: bool, plain: bool) -> Scores:
    apart = _sum_apart if plain else _manhattan
    bray_curtis = functools.partial(_bray_curtis, absolute=absolute, apart=apart)
    measure = {"cosine": _cosine, "bray_curtis": bray_curtis}
    distances = measure.get(distance, _euclidean)
    return differentiated(lambda x, w: -exponent * jnp.log(distances(x, w) + epsilon))


def _euclidean(hidden_BTD, head_DK):
    products_BTK = jnp.einsum("btd,dk->btk", hidden_BTD, head_DK)
    squares_BT1 = jnp.sum(jnp.square(hidden_BTD), axis=-1, keepdims=True)
    squares_K = jnp.sum(jnp.square(head_DK), axis=0)
    # Rounding can make the difference of large squares negative.
    return jnp.maximum(squares_BT1 + squares_K - 2 * products_BTK, 0.0) / hidden_BTD.shape[-1]


def _cosine(hidden_BTD, head_DK):
    hidden_BTD, head_DK = _unit(hidden_BTD, -1), _unit(head_DK, 0)
    return jnp.maximum(1 - jnp.einsum("btd,dk->btk", hidden_BTD, head_DK), 0.0)


def _unit(x, axis):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis, keepdims=True), 1e-24))


def _bray_curtis(hidden_BTD, head_DK, absolute, apart):
    apart_BTK = apart(hidden_BTD, head_DK)
    if absolute:
        sums_BTK = jnp.abs(hidden_BTD).sum(-1)[..., None] + jnp.abs(head_DK).sum(0)
    else:
        sums_BTK = apart(hidden_BTD, -head_DK)
    return apart_BTK / jnp.maximum(sums_BTK, 1e-6)


def _sum_apart(hidden_BTD, head_DK):
    """sum_i |x_i - w_i|, [B, T, K], one channel after the other: no array is [B, T, K, D]."""

    def apart(x_BT, w_K):
        return jnp.abs(x_BT[..., None] - w_K)

    def add(sums_BTK, channel):
        return sums_BTK + apart(*channel), None

    hidden_DBT = jnp.moveaxis(hidden_BTD, -1, 0)
    # The sum starts with a channel and not with zeros, so that it varies over a mesh as they do.
    first_BTK = apart(hidden_DBT[0], head_DK[0])
    return jax.lax.scan(add, first_BTK, (hidden_DBT[1:], head_DK[1:]))[0]


_manhattan = jax.custom_vjp(_sum_apart)


def _manhattan_forward(hidden_BTD, head_DK):
    return _manhattan(hidden_BTD, head_DK), (hidden_BTD, head_DK)


def _manhattan_backward(residuals, d_BTK):
    # Not by automatic differentiation, which would keep the signs from the forward pass.
    def one(_, channel):
        x_BT, w_K = channel
        signed_BTK = d_BTK * jnp.sign(x_BT[..., None] - w_K)
        return None, (signed_BTK.sum(-1), -signed_BTK.sum((0, 1)))

    hidden_BTD, head_DK = residuals
    channels = jnp.moveaxis(hidden_BTD, -1, 0), head_DK
    _, (dhidden_DBT, dhead_DK) = jax.lax.scan(one, None, channels)
    return jnp.moveaxis(dhidden_DBT, 0, -1), dhead_DK


_manhattan.defvjp(_manhattan_forward, _manhattan_backward)
