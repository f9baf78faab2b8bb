"""One-token rollout: reward tokens that the model itself draws when they are the label.

B batch, T length, V vocabulary, K one block of the vocabulary, N samples.
"""

import jax
import jax.numpy as jnp
from jax import lax

from objectives.cross_entropy import token_statistics
from objectives.losses.base import Inputs, Loss, softmax
from objectives.losses.expectation import expectation
from objectives.vocabulary import first_column
from objectives.weighting.base import check_number


def one_token_rollout(samples: int = 256, temperature: float = 1.0, beta: float = -0.1) -> Loss:
    """l = -1/N sum_n R_n log p(a_n), a_n drawn from softmax(z / temperature); R detached.

    R = 1 where a_n is the label and `beta` elsewhere; p = softmax(z), and the context stays that of
    the data (arXiv 2509.26313, a policy gradient of one token). At temperature 1 the expected
    gradient is (1 - beta) times that of -sg[p_y] log p_y, dynamic fine-tuning: the rewards beta of
    all tokens cancel, because sum_v p_v grad log p_v = 0.

    Draws are made by inverting the distribution function, a block of the vocabulary at a time; its
    sums are float32, whose rounding misplaces about 1 draw in 10^5 of a vocabulary of 10^5. A
    token's draws depend on its key alone. Where the vocabulary is spread over devices, a pass more
    finds the probability in front of each one's part.

    UNCONFIRMED: the paper's beta ("small, negative") and temperature ("above 1") were not
    available; both defaults are ours.

    Args:
      samples: N; 0 takes the exact expectation over the draws.
      temperature: of the draws, above 0.
      beta: reward of all tokens but the label.

    Raises:
      ValueError: a negative number of samples, a temperature that is not positive.
    """
    check_number("samples", samples, least=0)
    check_number("temperature", temperature, above=0)

    def rewards(targets_BT, start, width):
        is_target_BTK = (targets_BT - start)[..., None] == jnp.arange(width)
        return jnp.where(is_target_BTK, 1.0, beta)

    def expected(carry, log_p_BTK, start, tokens, _):
        targets_BT, log_sum_BT = tokens
        # log p = z - logsumexp(z), and a constant of the token changes no softmax.
        drawn_BTK = jnp.exp(log_p_BTK / temperature - log_sum_BT[..., None])
        a_BTK = drawn_BTK * rewards(targets_BT, start, log_p_BTK.shape[-1])
        return carry, a_BTK, -jnp.sum(a_BTK * log_p_BTK, axis=-1)

    def sampled(mass_BT, log_p_BTK, start, tokens, _):
        targets_BT, log_sum_BT, sorted_BTN, last, end_BT = tokens
        width = log_p_BTK.shape[-1]
        drawn_BTK = jnp.exp(log_p_BTK / temperature - log_sum_BT[..., None])
        upper_BTK = mass_BT[..., None] + jnp.cumsum(drawn_BTK, axis=-1)
        # Rounding must leave no draw between the last entry and what comes after it.
        upper_BTK = jnp.minimum(upper_BTK, end_BT[..., None])
        edges_BTK = jnp.where(start + jnp.arange(width) == last, end_BT[..., None], upper_BTK)
        edges_BTJ = jnp.concatenate([mass_BT[..., None], edges_BTK], axis=-1)
        below_BTJ = jnp.vectorize(jnp.searchsorted, signature="(n),(j)->(j)")(sorted_BTN, edges_BTJ)
        share_BTK = jnp.diff(below_BTJ).astype(jnp.float32) / samples
        a_BTK = share_BTK * rewards(targets_BT, start, width)
        # 0 * inf: what was never drawn may be impossible.
        value_BT = -jnp.sum(jnp.where(a_BTK != 0, a_BTK * log_p_BTK, 0.0), axis=-1)
        return upper_BTK[..., -1], a_BTK, value_BT

    def losses(inputs, statistics):
        prediction = softmax(inputs)
        if not samples and temperature == 1:
            # The gradient of the rewards beta is exactly 0, and their value beta times the entropy.
            p_BT = lax.stop_gradient(jnp.exp(statistics.log_probability))
            rest_BT = lax.stop_gradient(statistics.entropy)
            return (1 - beta) * p_BT * statistics.nll + beta * rest_BT
        log_sum_BT = _log_sum(inputs, statistics, temperature, inputs.axis)
        tokens = inputs.targets, log_sum_BT
        terms, carry = expected, ()
        if samples:
            draw = jnp.vectorize(lambda key: jax.random.uniform(key, samples), signature="()->(n)")
            carry, end_BT = _edges(inputs, statistics, temperature, log_sum_BT)
            last = first_column(inputs.head, inputs.axis) + inputs.head.shape[1] - 1
            tokens = *tokens, jnp.sort(draw(inputs.keys), axis=-1), last, end_BT
            terms = sampled
        return expectation(
            terms,
            prediction,
            statistics.logsumexp,
            carry,
            tokens,
            (),
            inputs.block_size,
            inputs.axis,
        )

    return Loss(losses=losses, random=samples > 0)


def _edges(inputs: Inputs, statistics, temperature, log_sum_BT) -> tuple[jax.Array, jax.Array]:
    """Where the distribution function of the draws begins and ends on this device, [B, T] both.

    It ends at infinity on the last one, and elsewhere where the next one begins.
    """
    if inputs.axis is None:
        return jnp.zeros_like(log_sum_BT), jnp.full_like(log_sum_BT, jnp.inf)
    mass_BT = jnp.exp(_log_sum(inputs, statistics, temperature, None) - log_sum_BT)
    masses_SBT = lax.all_gather(mass_BT, inputs.axis)
    edges_SBT = jnp.cumsum(masses_SBT, axis=0).at[-1].set(jnp.inf)
    edges_SBT = jnp.concatenate([jnp.zeros_like(edges_SBT[:1]), edges_SBT])
    here = lax.axis_index(inputs.axis)
    return edges_SBT[here], edges_SBT[here + 1]


def _log_sum(inputs: Inputs, statistics, temperature: float, axis: str | None) -> jax.Array:
    """log sum_v exp(log p_v / temperature), [B, T], detached: of a pass of its own but at 1.

    With the axis of the inputs v runs over the vocabulary, with None over this device's part.
    """
    if temperature == 1 and axis == inputs.axis:
        return jnp.zeros_like(statistics.logsumexp)
    hidden, head, scores = softmax(inputs)
    hidden, head = lax.stop_gradient((hidden, head))
    colder = scores._replace(logits=lambda h, w: scores.logits(h, w) / temperature)
    of_colder = token_statistics(
        hidden, head, inputs.targets, scores=colder, block_size=inputs.block_size, axis=axis
    )
    return lax.stop_gradient(of_colder.logsumexp - statistics.logsumexp / temperature)
