"""What policy gradients have in common: from their parts to an objective.

B rows, T tokens, P answers of a row.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from objectives.losses.base import CROSS_ENTROPY, Loss, prediction_statistics
from objectives.objective import Objective, Prepared
from objectives.policy.advantages import Advantages
from objectives.policy.aggregations import Aggregation
from objectives.policy.answers import (
    Answers,
    answer_means,
    find_answers,
    select,
    sums_from_here,
)
from objectives.policy.clipping import Bounds
from objectives.policy.kl import ESTIMATES, k1, k3
from objectives.policy.ratios import LogRatio
from objectives.policy.surrogates import Surrogate, clipped
from objectives.terms import Term, masked_sum
from objectives.weighting.base import check_number, reference

REFERENCE = "reference_nll"
# What a batch must hold for every policy gradient.
KEYS = ("advantages", "rewards", "behaviour_log_probability", "group_ids")

# What the logits of each drawn target were divided by, where that is not one number for all.
TEMPERATURES = "temperatures"

OLD = ("behaviour", "current", "stored")


class Parts(NamedTuple):
    """What a policy gradient is made of.

    Attributes:
      advantages: of the answers, formed before the batch is.
      ratio: see `objectives.policy.ratios`.
      old: what log p of the old policy is: "behaviour", "current" or "stored"; see `policy`.
      largest: of the log ratio. Above it the ratio has no gradient.
      bounds: (answers, rows of `scales`) -> `Bounds` of the ratios.
      surrogate: see `objectives.policy.surrogates`, and
      clips: its name, for the shares of tokens that it clips.
      aggregation: see `objectives.policy.aggregations`.
      batch_keys: what the functions below read of the batch, besides `KEYS`.
      scales: (answers, batch) -> {name: [B, T]}, computed for the whole batch before the forward
        pass.
      weigh: (answers, batch, advantages, step) -> weights [B, T] of the surrogate.
      measures: of `Objective`; what `weigh` reads of the batch is replaced by those of its name.
      weighs_kl: whether the weights are of the divergence in the loss, too.
      drops: whether tokens of weight 0 leave the averages and all else that is minimised.
      correct: (log p of the trained old policy - log p of the sampler) -> weights [B, T].
      redistribute: (advantages, ratio, scales) -> advantages [B, T].
      kl: name of the estimate of the divergence from the reference, and
      kl_coefficient: its coefficient; without it there is no reference.
      kl_in_reward: whether it shifts the advantages instead.
      entropy_coefficient: of the entropy that is added to the reward.
      estimate: (statistics, answers, batch, {name: reference}) -> {name: [B, T]}, in place of the
        advantages of the batch where it has "advantages"; reads the whole batch.
      init: () -> what is carried from step to step,
      carry: (answers, batch) -> the same after a step; None carries nothing, and
      temper: see `Objective`.
      further: (statistics, answers, prepared) -> terms besides.
      loss: gives the statistics.
    """

    advantages: Advantages
    ratio: LogRatio
    surrogate: Surrogate
    clips: str
    aggregation: Aggregation
    bounds: Callable[[Answers, Mapping[str, jax.Array]], Bounds]
    old: str = "behaviour"
    largest: float = 80.0
    batch_keys: tuple[str, ...] = ()
    scales: Callable[..., dict[str, jax.Array]] | None = None
    weigh: Callable[..., jax.Array] | None = None
    measures: Mapping[str, Callable[..., jax.Array]] = {}
    weighs_kl: bool = False
    drops: bool = False
    correct: Callable[[jax.Array], jax.Array] | None = None
    redistribute: Callable[..., jax.Array] | None = None
    kl: str = "k3"
    kl_coefficient: float = 0.0
    kl_in_reward: bool = False
    entropy_coefficient: float = 0.0
    estimate: Callable[..., dict[str, jax.Array]] | None = None
    init: Callable[[], Any] = tuple
    carry: Callable[..., Any] | None = None
    temper: Callable[[Any, jax.Array], jax.Array] | None = None
    further: Callable[..., dict[str, Term]] | None = None
    loss: Loss = CROSS_ENTROPY


def assemble(parts: Parts) -> Objective:
    """sum(factor * (w * surrogate + beta * KL - c * entropy)) / denominator, over drawn targets.

    Term: "loss", all that is minimised but for what `Parts.further` adds. Reported beside it, means
    over the drawn targets of the batch: "entropy"; "clip_low" and "clip_high", the shares that are
    clipped (`objectives.policy.surrogates.clipped`); "kl_behaviour_k1" and "kl_behaviour_k3", two
    estimates of KL(sampler || policy); "kl_reference", the estimate of `Parts.kl`, where there is a
    reference; "ratio_max" and "ratio_min", with micro-batches the mean of theirs; "advantage";
    "no_signal", the share of answers without an advantage; and with entropies in the batch the
    shares of tokens "positive_high", "positive_low", "negative_high" and "negative_low" by the sign
    of A and by the entropy above or below its mean. Rewards and lengths are those of the rollout.
    """
    batch_keys = tuple(dict.fromkeys((*KEYS, *parts.batch_keys)))
    if parts.old == "stored":
        batch_keys += ("old_log_probability",)
    return Objective(
        _prepare(parts),
        _terms(parts),
        init=parts.init,
        loss=parts.loss,
        whole_batch=parts.estimate is not None or bool(parts.measures),
        differentiated=("nll", "log_probability", *_further_fields(parts)),
        batch_keys=batch_keys,
        references=(REFERENCE,) if parts.kl_coefficient else (),
        measures=parts.measures,
        must_match={"prediction": parts.loss.prediction},
        advantages=parts.advantages,
        temper=parts.temper,
    )


def tempered(sampling_temperature: float) -> Loss:
    """Cross-entropy of softmax(logits / sampling_temperature), the distribution that is drawn from.

    What cuts a distribution besides, as top-p does, does not change these probabilities.

    Raises:
      ValueError: a temperature that is not above 0.
    """
    check_number("sampling_temperature", sampling_temperature, above=0)
    if sampling_temperature == 1:
        return CROSS_ENTROPY
    return CROSS_ENTROPY._replace(temperature=float(sampling_temperature))


def tempered_by_token(sampling_temperature: float) -> Loss:
    """`tempered`, but in training of softmax(logits / "temperatures" of the batch), token by token.

    That is what the sampler drew from. The hidden states are divided in float32, so that logits
    must not be soft-capped.
    """

    def statistics(inputs):
        temperatures_BT = inputs.stored[TEMPERATURES]
        scale_BT = 1 / jnp.where(temperatures_BT > 0, temperatures_BT, 1.0)
        hidden_BTD = inputs.hidden.astype(jnp.float32) * scale_BT[..., None]
        own = inputs._replace(hidden=hidden_BTD, temperature=1.0)
        return prediction_statistics(CROSS_ENTROPY, own)

    loss = tempered(sampling_temperature)
    return loss._replace(statistics=statistics, batch_keys=(TEMPERATURES,), softcapped=False)


def _further_fields(parts: Parts) -> tuple[str, ...]:
    return ("entropy",) * bool(parts.entropy_coefficient) + ("value",) * bool(parts.further)


def _prepare(parts: Parts):
    def prepare(statistics, aux, batch, references, state, step):
        answers = find_answers(batch)
        known = {}
        if parts.kl_coefficient:
            known[REFERENCE] = select(answers, reference(references, REFERENCE))
        rows = {**known, "advantages": select(answers, batch["advantages"])}
        if parts.estimate is not None:
            rows |= lax.stop_gradient(parts.estimate(statistics, answers, batch, known))
        elif parts.kl_coefficient and parts.kl_in_reward:
            rows["advantages"] -= sums_from_here(answers, penalties(parts, answers, batch, known))
        if parts.scales is not None:
            rows |= parts.scales(answers, batch)
        averaged = answers
        if parts.weigh is not None:
            weights_BT = parts.weigh(answers, {**batch, **aux}, rows["advantages"], step)
            if parts.drops:
                averaged = answers._replace(weights_BT=answers.weights_BT * weights_BT)
            else:
                rows["weights"] = weights_BT
        rows["factors"], denominator = parts.aggregation(averaged, rows["advantages"])
        totals = {
            "denominator": denominator,
            "tokens": answers.tokens,
            "rows": jnp.float32(len(batch["weights"])),
        }
        if parts.carry is not None:
            state = parts.carry(answers, batch)
        return Prepared(rows, totals, state, _metrics(answers, batch, rows["advantages"]))

    return prepare


def penalties(
    parts: Parts, answers: Answers, batch: Mapping[str, jax.Array], known: Mapping[str, jax.Array]
) -> jax.Array:
    """beta times the estimate of the divergence at each drawn target, of the sampler, [B, T].

    What is subtracted from the reward of a token: of what was drawn, so that it has no gradient.
    """
    sampler_BT = select(answers, batch["behaviour_log_probability"])
    divergence_BT = ESTIMATES[parts.kl](sampler_BT + known[REFERENCE])
    return parts.kl_coefficient * select(answers, divergence_BT)


def _terms(parts: Parts):
    def terms(statistics, aux, batch, prepared):
        answers, rows = find_answers(batch), prepared.rows
        # Selected first: a token of weight 0 may hold anything.
        log_p_BT = select(answers, statistics.log_probability)
        entropy_BT = select(answers, statistics.entropy)
        sampler_BT = select(answers, batch["behaviour_log_probability"])
        old_BT = {
            "behaviour": lambda: sampler_BT,
            "current": lambda: lax.stop_gradient(log_p_BT),
            "stored": lambda: select(answers, batch["old_log_probability"]),
        }[parts.old]()
        log_ratio_BT = parts.ratio(answers, log_p_BT, old_BT)
        ratio_BT = jnp.exp(jnp.minimum(log_ratio_BT, parts.largest))
        bounds = parts.bounds(answers, rows)
        advantages_BT = rows["advantages"]
        if parts.redistribute is not None:
            fixed_BT = lax.stop_gradient(ratio_BT)
            advantages_BT = parts.redistribute(advantages_BT, fixed_BT, rows)
        loss_BT = parts.surrogate(ratio_BT, log_p_BT, advantages_BT, bounds)
        if "weights" in rows and not parts.weighs_kl:
            loss_BT *= rows["weights"]
        if parts.correct is not None:
            loss_BT *= lax.stop_gradient(parts.correct(old_BT - sampler_BT))
        low_BT, high_BT = clipped(parts.clips, ratio_BT, advantages_BT, bounds)
        reported = {
            "entropy": entropy_BT,
            "clip_low": low_BT.astype(jnp.float32),
            "clip_high": high_BT.astype(jnp.float32),
            "kl_behaviour_k1": k1(sampler_BT - log_p_BT),
            "kl_behaviour_k3": k3(sampler_BT - log_p_BT),
        }
        if parts.kl_coefficient:
            reported["kl_reference"] = ESTIMATES[parts.kl](log_p_BT + rows[REFERENCE])
            if not parts.kl_in_reward:
                loss_BT += parts.kl_coefficient * reported["kl_reference"]
        if "weights" in rows and parts.weighs_kl:
            loss_BT *= rows["weights"]
        if parts.entropy_coefficient:
            loss_BT -= parts.entropy_coefficient * entropy_BT
        value = masked_sum(rows["factors"], loss_BT)
        found = {"loss": Term(value, prepared.totals["denominator"])}
        if parts.further is not None:
            found |= parts.further(statistics, answers, prepared)
        live_BT = answers.live_BT.astype(jnp.float32)
        for name, x_BT in reported.items():
            found[name] = Term(masked_sum(live_BT, x_BT), prepared.totals["tokens"], 0.0)
        return found | _extremes(answers, ratio_BT, prepared.totals["rows"])

    return terms


def _extremes(answers: Answers, ratio_BT: jax.Array, rows: jax.Array) -> dict[str, Term]:
    """The largest and the smallest ratio, as sums that add up to the mean over micro-batches."""
    ratio_BT = lax.stop_gradient(ratio_BT)
    high = jnp.max(jnp.where(answers.live_BT, ratio_BT, 0.0))
    low = jnp.min(jnp.where(answers.live_BT, ratio_BT, jnp.inf))
    low = jnp.where(jnp.isfinite(low), low, 0.0)
    here = len(ratio_BT)
    return {"ratio_max": Term(here * high, rows, 0.0), "ratio_min": Term(here * low, rows, 0.0)}


def _metrics(
    answers: Answers, batch: Mapping[str, jax.Array], advantages_BT: jax.Array
) -> dict[str, jax.Array]:
    """What is known of a batch before the forward pass, float32 scalars."""
    number, tokens = jnp.maximum(answers.number, 1.0), jnp.maximum(answers.tokens, 1.0)
    silent_BP = answers.there_BP & (answer_means(answers, jnp.abs(advantages_BT)) == 0)
    found = {
        "advantage": jnp.sum(select(answers, advantages_BT)) / tokens,
        "no_signal": jnp.sum(silent_BP, dtype=jnp.float32) / number,
    }
    if "behaviour_entropy" in batch:
        entropy_BT = select(answers, batch["behaviour_entropy"])
        high_BT = entropy_BT > jnp.sum(entropy_BT) / tokens
        for sign, signed_BT in (("positive", advantages_BT > 0), ("negative", advantages_BT < 0)):
            for size, sized_BT in (("high", high_BT), ("low", ~high_BT)):
                there_BT = answers.live_BT & signed_BT & sized_BT
                found[f"{sign}_{size}"] = jnp.sum(there_BT, dtype=jnp.float32) / tokens
    return found
