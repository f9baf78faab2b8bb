"""Dual-head distillation: the teacher has a head of the student to itself.

B batch, T length, D width, V vocabulary, K one block of the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from objectives.cross_entropy import token_statistics
from objectives.distillation.additive import Summand, added_up
from objectives.losses.base import Loss, Prediction
from objectives.vocabulary import as_head, products, total
from objectives.weighting.base import check_name, check_number

DIVERGENCES = ("binary_kl_norm", "binary_kl")
ALIGNMENTS = ("none", "hidden")


def dhkd(
    divergence: str = "binary_kl_norm",
    temperature: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 1.0,
    alignment: str = "none",
) -> Loss:
    """l = gamma (-log p_y) + alpha sum_v B(s_v, t_v), p of the head and s of a second head.

    DHKD (released code: penghui-yang/DHKD). t are the teacher's logits, and s those of a linear
    head that only training has: what is evaluated and sampled from is p. With the divergence k of
    two Bernoulli distributions and the logistic function g,

      binary_kl_norm  B = T^2 k(1/2 || g((s - t) / T)), symmetric in s and t
      binary_kl       B = T^2 k(g(t / T) || g(s / T))

    The method is of images with 100 and 1,000 classes: the sum grows with the vocabulary, and
    alpha is to be chosen with it.

    With `alignment` = "hidden" the gradient of the second term in the hidden state of each token
    loses its part along that of the first, where their product is negative. OURS: the released code
    does so with the gradients of all parameters and of the batch as one, which would take two
    backward passes. With it no forward mode exists.

    The second head has no bias; the released code also knows one with a hidden layer.

    Args:
      divergence: binary_kl_norm | binary_kl.
      temperature: T, above 0.
      gamma: factor of cross-entropy, at least 0.
      alpha: factor of the divergence, at least 0; 1 for CIFAR-100, 0.1 for ImageNet.
      alignment: none | hidden.

    Raises:
      ValueError: an unknown name, a number out of its bounds.
    """
    check_name("divergence", divergence, DIVERGENCES)
    check_name("alignment", alignment, ALIGNMENTS)
    check_number("temperature", temperature, above=0)
    check_number("gamma", gamma, least=0)
    check_number("alpha", alpha, least=0)
    make = {"binary_kl_norm": binary_kl_norm, "binary_kl": binary_kl}[divergence]
    summand = make(temperature)

    def statistics(inputs):
        of_head, of_second = inputs.hidden, inputs.hidden
        if alignment == "hidden":
            of_head, of_second = _aligned(inputs.axis, inputs.hidden)
        found = token_statistics(
            of_head,
            inputs.head,
            inputs.targets,
            softcap=inputs.softcap,
            block_size=inputs.block_size,
            axis=inputs.axis,
        )
        second_head = as_head(inputs.params["head"], inputs.head, inputs.axis)
        second = Prediction(of_second, second_head, products())
        teacher = inputs.teachers["teacher"]
        apart_BT = added_up(summand, second, teacher, inputs.block_size, inputs.axis)
        return found._replace(other_loss=gamma * found.nll + alpha * apart_BT)

    return Loss(
        init=_init,
        statistics=statistics,
        teachers=("teacher",),
        prediction="softmax, beside a second head",
    )


def _init(key, vocab_size, width):
    """A second head, as a linear layer of the released code starts: uniform in +-1 / sqrt(D)."""
    bound = width**-0.5
    return {"head": jax.random.uniform(key, (width, vocab_size), jnp.float32, -bound, bound)}


@functools.cache
def binary_kl_norm(temperature: float) -> Summand:
    """T^2 k(1/2 || g(x)) = T^2 log cosh(x / 2), x = (s - t) / T."""

    def terms(s_BTK, t_BTK):
        size_BTK = jnp.abs(s_BTK - t_BTK) / temperature
        return temperature**2 * (size_BTK / 2 + jnp.log1p(jnp.expm1(-size_BTK) / 2))

    def slopes(s_BTK, t_BTK):
        return temperature / 2 * jnp.tanh((s_BTK - t_BTK) / (2 * temperature))

    return Summand(terms, slopes)


@functools.cache
def binary_kl(temperature: float) -> Summand:
    """T^2 k(g(t / T) || g(s / T))."""

    def terms(s_BTK, t_BTK):
        s_BTK, t_BTK = s_BTK / temperature, t_BTK / temperature
        yes_BTK = jax.nn.log_sigmoid(t_BTK) - jax.nn.log_sigmoid(s_BTK)
        no_BTK = jax.nn.log_sigmoid(-t_BTK) - jax.nn.log_sigmoid(-s_BTK)
        share_BTK = jax.nn.sigmoid(t_BTK)
        return temperature**2 * (share_BTK * yes_BTK + (1 - share_BTK) * no_BTK)

    def slopes(s_BTK, t_BTK):
        return temperature * (
            jax.nn.sigmoid(s_BTK / temperature) - jax.nn.sigmoid(t_BTK / temperature)
        )

    return Summand(terms, slopes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _aligned(axis, hidden_BTD):
    """The hidden states twice; the gradient of the second copy is aligned with the first's."""
    return hidden_BTD, hidden_BTD


def _aligned_forward(axis, hidden_BTD):
    return (hidden_BTD, hidden_BTD), None


def _aligned_backward(axis, _, cotangents):
    # Each device holds what its part of the vocabulary contributes to both gradients.
    first_BTD, second_BTD = (total(d_BTD.astype(jnp.float32), axis) for d_BTD in cotangents)
    product_BT = jnp.sum(first_BTD * second_BTD, axis=-1)
    square_BT = jnp.sum(jnp.square(first_BTD), axis=-1)
    against_BT = jnp.minimum(product_BT, 0) / jnp.where(square_BT > 0, square_BT, 1.0)
    first_BTD, second_BTD = cotangents
    kept_BTD = second_BTD - (against_BT[..., None] * first_BTD).astype(second_BTD.dtype)
    return (first_BTD + kept_BTD,)


_aligned.defvjp(_aligned_forward, _aligned_backward)
