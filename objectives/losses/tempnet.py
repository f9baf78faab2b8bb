"""TempNet: a small network chooses the temperature of every prediction.

B batch, T length, D width, V vocabulary, H width of the network.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from objectives.losses.base import Loss, Prediction
from objectives.vocabulary import own_rows, products, total, vocabulary_size
from objectives.weighting.base import check_number


def tempnet(
    rho: float = 8.0,
    tau_min: float = 0.5,
    tau_max: float = 5.0,
    width: int = 256,
    dropout: float = 0.5,
    learning_rate: float = 2e-6,
) -> Loss:
    """l = tau (-log softmax(z / tau)_y) + (rho - log V) tau, tau given by a network of sg[z].

    arXiv 2404.04575. The network, as in the authors' code, reads the normalised logits:

      x = A2 dropout(sigmoid(A1 z / |z| + a1)) + a2
      tau = tau_min + (tau_max - tau_min) sigmoid(b^T ((softmax(x / e^s) - 1/H) x) + c)

    and starts at b = 1, c = s = 0. Gradients pass through z and tau in the loss, and not through z
    in the network. The predicted distribution is softmax(z / tau), in evaluation and sampling, too.

    d l / d tau = rho - KL(softmax(z / tau) || uniform): an interior tau sets that divergence to
    rho, and rho >= log V drives tau to tau_min. The defaults are of GPT-2's vocabulary of 50,257.

    A1 z = (head A1)^T hidden and |z|^2 = hidden^T head head^T hidden: the network reads all logits
    and no array of [B, T, V] exists. Hence the logits must not be soft-capped.

    Args:
      rho: size of the divergence from uniform, nats.
      tau_min, tau_max: lowest and highest temperature, tau_min above 0.
      width: of the network, H.
      dropout: share of the first layer that is dropped in training.
      learning_rate: peak for the network; 0 is the model's.

    Raises:
      ValueError: a bad number.
    """
    check_number("tau_min", tau_min, above=0)
    check_number("tau_max", tau_max, above=tau_min)
    check_number("width", width, least=1)
    check_number("dropout", dropout, least=0)
    if dropout >= 1:
        raise ValueError(f"dropout={dropout} must be below 1")
    check_number("learning_rate", learning_rate, least=0)

    def temperatures(inputs):
        """tau, [B, T] float32."""
        p = inputs.params
        hidden_BTD, head_DV = (
            lax.stop_gradient(x).astype(jnp.float32) for x in (inputs.hidden, inputs.head)
        )
        square_BT = jnp.einsum("btd,de,bte->bt", hidden_BTD, head_DV @ head_DV.T, hidden_BTD)
        projected_BTH = hidden_BTD @ (head_DV @ own_rows(p["first"], head_DV, inputs.axis))
        square_BT, projected_BTH = total((square_BT, projected_BTH), inputs.axis)
        projected_BTH /= jnp.sqrt(jnp.maximum(square_BT, 1e-24))[..., None]
        x_BTH = jax.nn.sigmoid(projected_BTH + p["first_bias"])
        if dropout and inputs.keys is not None:
            keep = jnp.vectorize(
                lambda key: jax.random.bernoulli(key, 1 - dropout, (width,)), signature="()->(h)"
            )
            x_BTH = jnp.where(keep(inputs.keys), x_BTH / (1 - dropout), 0.0)
        x_BTH = x_BTH @ p["second"] + p["second_bias"]
        share_BTH = jax.nn.softmax(x_BTH / jnp.exp(p["log_scale"])) - 1 / width
        score_BT = (share_BTH * x_BTH) @ p["last"] + p["last_bias"]
        return tau_min + (tau_max - tau_min) * jax.nn.sigmoid(score_BT)

    def predict(inputs):
        hidden_BTD = inputs.hidden / temperatures(inputs)[..., None]
        return Prediction(hidden_BTD.astype(inputs.hidden.dtype), inputs.head, products())

    def losses(inputs, statistics):
        vocab_size = vocabulary_size(inputs.head, inputs.axis)
        return tempered_loss(statistics.nll, temperatures(inputs), rho, vocab_size)

    return Loss(
        init=_init(width),
        predict=predict,
        losses=losses,
        random=dropout > 0,
        prediction=f"tempnet, width {width}",
        softcapped=False,
        learning_rate=learning_rate,
    )


def _init(width):
    """(key, vocab_size, D) -> parameters of the network, as the authors' code starts it."""

    def init(key, vocab_size, _):
        keys = jax.random.split(key, 4)

        def uniform(key, inputs, shape):
            bound = inputs**-0.5
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        return {
            "first": uniform(keys[0], vocab_size, (vocab_size, width)),
            "first_bias": uniform(keys[1], vocab_size, (width,)),
            "second": uniform(keys[2], width, (width, width)),
            "second_bias": uniform(keys[3], width, (width,)),
            "log_scale": jnp.zeros(()),
            "last": jnp.ones((width,)),
            "last_bias": jnp.zeros(()),
        }

    return init


def tempered_loss(nll: jax.Array, tau: jax.Array, rho: float, vocab_size: int) -> jax.Array:
    """tau nll + (rho - log V) tau, nll that of softmax(z / tau)."""
    return tau * nll + (rho - math.log(vocab_size)) * tau
