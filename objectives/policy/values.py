"""Advantages of tokens from a value head.

B rows, T tokens, D width, P answers of a row. V_t is what the head expects of the rewards from the
t-th drawn target of an answer on, before that is drawn; after the last one it is 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from objectives.losses.base import Inputs, Loss, prediction_statistics
from objectives.policy.answers import Answers, places, select, to_tokens
from objectives.segments import firsts
from objectives.vocabulary import total
from objectives.weighting.samples import find_samples, sample_means, spread


def gae(
    answers: Answers,
    rewards_BT: jax.Array,
    values_BT: jax.Array,
    gamma: float,
    lambda_: float,
) -> jax.Array:
    """A_t = delta_t + gamma lambda A_t+1, delta_t = r_t + gamma V_t+1 - V_t: arXiv 1506.02438.

    Within the drawn targets of an answer, [B, T]; 0 elsewhere.

    Args:
      answers: of the batch.
      rewards_BT: of each drawn target.
      values_BT: V.
      gamma: discount of what comes one token later.
      lambda_: 1 is the return less the value, 0 the difference of one step.
    """
    values_BT, rewards_BT = select(answers, values_BT), select(answers, rewards_BT)
    # Where an answer ends, seen from behind: the token after it has another number.
    last_BT = jnp.roll(firsts(answers.numbers_BT), -1, axis=1).at[:, -1].set(True)

    def back(carry, token):
        value_B, reward_B, live_B, last_B = token
        next_value_B, next_B = (jnp.where(last_B, 0.0, x_B) for x_B in carry)
        delta_B = reward_B + gamma * next_value_B - value_B
        own_B = delta_B + gamma * lambda_ * next_B
        # What was not drawn, inside of an answer, is passed over.
        carry = jnp.where(live_B, value_B, next_value_B), jnp.where(live_B, own_B, next_B)
        return carry, jnp.where(live_B, own_B, 0.0)

    zeros_B = jnp.zeros_like(values_BT[:, 0])
    columns = (values_BT.T, rewards_BT.T, answers.live_BT.T, last_BT.T)
    return lax.scan(back, (zeros_B, zeros_B), columns, reverse=True)[1].T


def last_targets(answers: Answers) -> jax.Array:
    """Which drawn targets are the last of their answers, [B, T] booleans."""
    return answers.live_BT & (places(answers) == to_tokens(answers, answers.lengths_BP))


def group_rewards(answers: Answers, group_ids_BT: jax.Array, rewards_BT: jax.Array) -> jax.Array:
    """The mean reward of the answers of the group, at each drawn target, [B, T].

    Answers whose reward is NaN are left out; 0 where no other is there.
    """
    samples = find_samples({"sample_ids": group_ids_BT, "weights": answers.weights_BT})
    judged_BT = answers.live_BT & ~jnp.isnan(rewards_BT)
    # Every answer counts once, however long it is.
    lengths_BT = jnp.maximum(to_tokens(answers, answers.lengths_BP), 1.0)
    weights_BT = jnp.where(judged_BT, 1 / lengths_BT, 0.0)
    (means_N,) = sample_means(samples, weights_BT, jnp.where(judged_BT, rewards_BT, 0.0))
    return select(answers, spread(samples, means_N))


def with_value_head(loss: Loss, shared: bool = True, learning_rate: float = 0.0) -> Loss:
    """A loss of the same distribution whose statistics have `value` = hidden @ w + b.

    The head starts at 0, and is trained with the model's parameters and kept in its checkpoints.

    Args:
      loss: of the distribution.
      shared: whether the gradient of the value passes into the model.
      learning_rate: peak for the head; 0 is the model's.
    """

    def statistics(inputs: Inputs):
        hidden_BTD = inputs.hidden.astype(jnp.float32)
        if not shared:
            hidden_BTD = lax.stop_gradient(hidden_BTD)
        value_BT = hidden_BTD @ inputs.params["value"] + inputs.params["value_bias"]
        if inputs.axis:
            # Devices that share a vocabulary all have the whole value; each gives its part of it,
            # so that the gradient is counted once.
            value_BT = total(value_BT / lax.axis_size(inputs.axis), inputs.axis)
        return prediction_statistics(loss, inputs)._replace(value=value_BT)

    return loss._replace(
        init=_init,
        statistics=statistics,
        prediction="softmax, beside a value head",
        learning_rate=learning_rate,
    )


def _init(key: jax.Array, vocab_size: int, width: int) -> Any:
    del key, vocab_size
    return {"value": jnp.zeros((width,), jnp.float32), "value_bias": jnp.zeros((), jnp.float32)}
