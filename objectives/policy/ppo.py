"""PPO: clipped ratios times the advantages of tokens, from a value head."""

import jax
import jax.numpy as jnp

from objectives.objective import Objective
from objectives.policy import clipping
from objectives.policy.advantages import rewards_themselves
from objectives.policy.aggregations import AGGREGATIONS, make_aggregation
from objectives.policy.answers import select
from objectives.policy.base import REFERENCE, Parts, assemble, penalties, tempered
from objectives.policy.ratios import token
from objectives.policy.surrogates import ppo as clipped_ratio
from objectives.policy.values import gae, group_rewards, last_targets, with_value_head
from objectives.terms import Term, masked_sum
from objectives.weighting.base import check_name, check_number

TARGETS = ("return", "answer", "group")


def ppo(
    gamma: float = 1.0,
    lambda_: float = 1.0,
    value_target: str = "return",
    value_coefficient: float = 1.0,
    shared: bool = True,
    value_learning_rate: float = 0.0,
    whiten: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    aggregation: str = "token_mean",
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    sampling_temperature: float = 1.0,
) -> Objective:
    """-min(r A, clip(r) A) with A of tokens by GAE(gamma, lambda), beside a value head: PPO.

    arXiv 1707.06347 and 1506.02438. The reward of an answer is that of its last token; with a
    reference each token's reward loses beta * (log p_sampler - log p_reference). The values V, a
    linear head on the hidden states in front of the output matrix, are learned by

      value_coefficient * mean over drawn targets of (V - target)^2 / 2

    with the target A + V ("return"), the reward of the answer at each of its tokens ("answer"), or
    the mean reward of its group ("group"): token-supervised values. This term is "value_loss".

    Advantages are those of the values before the step, computed anew in each step on what was
    drawn. They read the values of the whole batch: with micro-batches this costs a forward pass
    more. An answer without a reward is not learned from.

    Args:
      gamma: discount a token, in [0, 1].
      lambda_: of GAE, in [0, 1]: 1 is the return less the value.
      value_target: return | answer | group.
      value_coefficient: of the loss of the values, at least 0.
      shared: whether the gradient of the values passes into the model.
      value_learning_rate: peak for the head; 0 is the model's.
      whiten: advantages less their mean, by their standard deviation over the batch.
      clip_low, clip_high: ratios are clipped to [1 - low, 1 + high]; 0 is no bound.
      dual_clip: largest ratio where A < 0, at least 1; 0 is none.
      aggregation: token_mean | sequence_mean | sequence_sum | fixed_length | sign_balanced.
      kl_coefficient: beta, at least 0; 0 needs no reference.
      entropy_coefficient: of the bonus for entropy.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: a bad number or name.
    """
    check_number("gamma", gamma, least=0, most=1)
    check_number("lambda_", lambda_, least=0, most=1)
    check_name("value_target", value_target, TARGETS)
    check_name("aggregation", aggregation, AGGREGATIONS)
    for name, value in (
        ("value_coefficient", value_coefficient),
        ("value_learning_rate", value_learning_rate),
        ("clip_high", clip_high),
        ("kl_coefficient", kl_coefficient),
    ):
        check_number(name, value, least=0)
    check_number("clip_low", clip_low, least=0, most=1)
    if dual_clip:
        check_number("dual_clip", dual_clip, least=1)
    bounds = clipping.constant(clip_low, clip_high, dual_clip)

    parts = Parts(
        advantages=rewards_themselves(),
        ratio=token,
        surrogate=clipped_ratio,
        clips="ppo",
        aggregation=make_aggregation(aggregation),
        bounds=lambda answers, rows: bounds,
        kl="k1",
        kl_coefficient=kl_coefficient,
        kl_in_reward=True,
        entropy_coefficient=entropy_coefficient,
        further=_value_loss(value_coefficient),
        loss=with_value_head(tempered(sampling_temperature), shared, value_learning_rate),
    )
    estimate = _advantages_and_targets(parts, gamma, lambda_, value_target, whiten)
    return assemble(parts._replace(estimate=estimate))


def _advantages_and_targets(
    parts: Parts, gamma: float, lambda_: float, value_target: str, whiten: bool
):
    """`Parts.estimate`: the advantages of tokens and what their values learn, see `ppo`."""

    def estimate(statistics, answers, batch, known):
        values_BT = select(answers, statistics.value)
        rewards_BT = select(answers, batch["rewards"])
        failed_BT = jnp.isnan(rewards_BT)
        of_token_BT = jnp.where(last_targets(answers) & ~failed_BT, rewards_BT, 0.0)
        if REFERENCE in known:
            of_token_BT -= penalties(parts, answers, batch, known)
        advantages_BT = gae(answers, of_token_BT, values_BT, gamma, lambda_)
        targets_BT = {
            "return": lambda: advantages_BT + values_BT,
            "answer": lambda: rewards_BT,
            "group": lambda: group_rewards(answers, batch["group_ids"], rewards_BT),
        }[value_target]()
        learned_BT = (answers.live_BT & ~failed_BT).astype(jnp.float32)
        if whiten:
            advantages_BT = whitened(advantages_BT, learned_BT)
        return {
            "advantages": jnp.where(learned_BT > 0, advantages_BT, 0.0),
            "targets": jnp.where(learned_BT > 0, targets_BT, 0.0),
            "learned": learned_BT,
        }

    return estimate


def _value_loss(coefficient: float):
    def further(statistics, answers, prepared):
        learned_BT, targets_BT = prepared.rows["learned"], prepared.rows["targets"]
        apart_BT = select(answers, statistics.value) - targets_BT
        square = masked_sum(learned_BT, jnp.square(apart_BT))
        return {"value_loss": Term(square / 2, jnp.sum(learned_BT), coefficient)}

    return further


def whitened(values_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """(x - mean) / standard deviation over the tokens of weight 1; 0 where all are equal."""
    number = jnp.maximum(jnp.sum(weights_BT), 1.0)
    apart_BT = values_BT - masked_sum(weights_BT, values_BT) / number
    square = masked_sum(weights_BT, jnp.square(apart_BT)) / number
    return apart_BT / jnp.sqrt(jnp.where(square > 0, square, 1.0))
