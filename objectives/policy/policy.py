"""A policy gradient from the names of its parts: any combination, by lines of a config."""

from collections.abc import Mapping

from objectives.objective import Objective
from objectives.policy import advantages, clipping, token_weights
from objectives.policy.aggregations import AGGREGATIONS, make_aggregation
from objectives.policy.base import OLD, TEMPERATURES, Parts, assemble, tempered, tempered_by_token
from objectives.policy.entropy import (
    entropy_scale,
    no_scale,
    redistributed,
    relative_entropy,
    temperature_factors,
)
from objectives.policy.group_divergence import group_divergence
from objectives.policy.kl import ESTIMATES
from objectives.policy.ratios import RATIOS, make_ratio
from objectives.policy.surrogates import SURROGATES, make_surrogate
from objectives.weighting.base import check_name, check_number
from objectives.weighting.selection import check_share

ADVANTAGES = ("group_normalised", "token_normalised", "centred", "leave_one_out", "rewards")
CLIPS = ("constant", "position", "entropy")
PLACES = ("loss", "reward")
MEANS = ("all", "kept")


def policy(
    advantage: str = "group_normalised",
    ddof: int = 1,
    epsilon: float = 1e-6,
    baseline: str = "none",
    keep_answers: int = 0,
    ratio: str = "token",
    old: str = "behaviour",
    detach_prefix: bool = True,
    sentence_ends: str = "",
    max_log_ratio: float = 80.0,
    surrogate: str = "ppo",
    clip: str = "constant",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    clip_power: float = 0.5,
    entropy_pivot: float = 0.8,
    redistribution: float = 0.0,
    temperature_tau: float = 0.0,
    released: bool = False,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    aggregation: str = "token_mean",
    length: int = 0,
    token_weight: str = "none",
    k_low: float = 0.5,
    k_high: float = 5.0,
    alpha: float = 1.7,
    keep_tokens: float = 1.0,
    keep_tokens_last: float = 1.0,
    keep_tokens_steps: int = 0,
    mean_over: str = "all",
    kl: str = "k3",
    kl_coefficient: float = 0.0,
    kl_in: str = "loss",
    entropy_coefficient: float = 0.0,
    sampling_temperature: float = 1.0,
) -> Objective:
    """Policy gradient of answers drawn from the model: advantage, ratio, clip, surrogate and mean.

    With d the drawn targets, A their advantages and r the ratios of the policy to the old one,

      loss = aggregation of (w * surrogate(r, log p, A, bounds) + beta * KL - c * entropy)

    The files beside this one have the equation of every name. The distribution is
    softmax(logits / sampling_temperature), which is that of the sampler; what top-p cuts off does
    not change log p. Token log-probabilities carry the gradient: no array [B, T, V] exists.

    The old policy is

      behaviour  the sampler. Right for any number of steps on what was drawn; where sampler and
                 trained model compute differently, r differs from 1 in the first step.
      current    the policy itself, without gradient: r = 1. Exact in the first step on what was
                 drawn; in later ones nothing is clipped.
      stored     "old_log_probability" of the batch: log p of the trained model before its first
                 step on what was drawn.

    The token weight "icepop" is k = p_old / p_sampler where k_low <= k <= k_high, else 0, and needs
    an old policy other than the sampler; `icepop` says what it is in later steps.

    KL needs the reference "reference_nll"; in the reward it takes the sum of beta * estimate from a
    token to the end of its answer from the advantage, with log p of the sampler, after the
    advantages were normalised (OURS: they are before references are known). Weights and clips by
    entropy need "behaviour_entropy" in batches, and "group_divergence" the array of its name.

    Args:
      advantage: group_normalised | token_normalised | centred | leave_one_out | rewards.
      ddof: of group_normalised: 1 divides squares by G - 1, 0 by G.
      epsilon: of group_normalised and token_normalised: added to the standard deviation, at least
        0.
      baseline: of rewards: none | batch, the mean that is subtracted.
      keep_answers: answers of a group, those with the largest variance of A; 0 keeps all.
      ratio: token | sequence | sequence_token | cumulative | cumulative_mean | segment |
        prefix_min.
      old: behaviour | current | stored.
      detach_prefix: of cumulative, cumulative_mean, segment, prefix_min: only a token's own
        log-probability has a gradient in its ratio.
      sentence_ends: of segment: ids of the tokens that end a sentence, as "13,198"; "" for none.
      max_log_ratio: largest logarithm of a ratio, above 0 and at most 80.
      surrogate: reinforce | ppo | cispo | sapo.
      clip: constant | position | entropy.
      clip_low, clip_high: constant: r in [1 - low, 1 + high], 0 is no bound; position: log r in
        [-low t^power, high t^power]; entropy: as constant, above 0, wider by the entropy of a
        token.
      dual_clip: largest ratio where A < 0, at least 1; 0 is none. That of position is its high.
      clip_power: of position: power of the place t in the answer.
      entropy_pivot: of entropy: quantile of log entropy that counts as neither low nor high.
      redistribution: of entropy: how much the entropy of a token scales A; 0 is off.
      temperature_tau: of entropy: tau in [0, 1). A token is drawn at rollouts.temperature times
        1 + tau h, h its entropy on a scale from -1 to 1; 0 is off.
      released: of entropy: the sign of the released code of HAPO for low entropies; of
        group_divergence: the weights of the released code of TW-GRPO, which have a gradient.
      tau_positive, tau_negative: of sapo, above 0: slopes of the gate for A > 0 and others.
      aggregation: token_mean | sequence_mean | sequence_sum | fixed_length | sign_balanced.
      length: of fixed_length: what sums over tokens are divided by; 0 is that of a row.
      token_weight: none | icepop | group_divergence | advantage_entropy | entropy_quantile.
      k_low, k_high: of icepop: bounds of k.
      alpha: of group_divergence: weight at the largest divergence, at least 0; 1 is off.
      keep_tokens: of advantage_entropy and entropy_quantile: share of tokens, in (0, 1].
      keep_tokens_last: of advantage_entropy: share after keep_tokens_steps steps.
      keep_tokens_steps: of advantage_entropy: steps of the linear schedule; 0 is none.
      mean_over: all | kept: whether tokens that a weight drops count in averages.
      kl: k1 | k2 | k3, the estimate.
      kl_coefficient: beta, at least 0; 0 needs no reference.
      kl_in: loss | reward.
      entropy_coefficient: c, of the bonus for entropy.
      sampling_temperature: that answers are drawn with.

    Raises:
      ValueError: an unknown name, a bad number, or parts that do not go together.
    """
    given = dict(locals())
    _check_names(given)
    _check_numbers(given)
    return assemble(_parts(given))


def token_ids(text: str) -> tuple[int, ...]:
    """The ids of "13,198"; () of "".

    Raises:
      ValueError: no such list.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"sentence_ends={text!r} must be ids of tokens with commas between them")
    return tuple(map(int, parts))


def _check_names(given: Mapping[str, object]) -> None:
    choices = {
        "advantage": ADVANTAGES,
        "baseline": ("none", "batch"),
        "ratio": RATIOS,
        "old": OLD,
        "surrogate": SURROGATES,
        "clip": CLIPS,
        "aggregation": AGGREGATIONS,
        "token_weight": token_weights.TOKEN_WEIGHTS,
        "mean_over": MEANS,
        "kl": tuple(ESTIMATES),
        "kl_in": PLACES,
    }
    for name, valid in choices.items():
        check_name(name, given[name], valid)
    if given["token_weight"] == "icepop" and given["old"] == "behaviour":
        raise ValueError(
            "old='behaviour' leaves icepop nothing to correct; valid: 'current', 'stored'"
        )
    dropping = given["token_weight"] in ("advantage_entropy", "entropy_quantile")
    if given["mean_over"] == "kept" and not dropping:
        raise ValueError(
            "mean_over='kept' needs a token_weight that drops tokens: 'advantage_entropy' or "
            "'entropy_quantile'"
        )


def _check_numbers(given: Mapping[str, float]) -> None:
    for name in (
        "epsilon",
        "keep_answers",
        "clip_low",
        "clip_high",
        "redistribution",
        "length",
        "alpha",
        "keep_tokens_steps",
        "kl_coefficient",
    ):
        check_number(name, given[name], least=0)
    for name in ("tau_positive", "tau_negative", "k_low"):
        check_number(name, given[name], above=0)
    check_number("entropy_coefficient", given["entropy_coefficient"])
    check_number("clip_power", given["clip_power"])
    check_number("k_high", given["k_high"], least=given["k_low"])
    check_number("max_log_ratio", given["max_log_ratio"], above=0, most=80)
    check_number("entropy_pivot", given["entropy_pivot"], least=0, most=1)
    check_share("keep_tokens", given["keep_tokens"])
    check_share("keep_tokens_last", given["keep_tokens_last"])
    if given["clip"] != "position":
        check_number("clip_low", given["clip_low"], most=1)
    if given["clip"] == "entropy":
        check_number("clip_low", given["clip_low"], above=0)
        check_number("clip_high", given["clip_high"], above=0)
    else:
        for name in ("redistribution", "temperature_tau"):
            if given[name]:
                raise ValueError(f"{name}={given[name]} must be 0 but for clip='entropy'")
    check_number("temperature_tau", given["temperature_tau"], least=0)
    if given["temperature_tau"] >= 1:
        raise ValueError(f"temperature_tau={given['temperature_tau']} must be below 1")
    if given["temperature_tau"] and (given["kl_coefficient"] or given["old"] == "stored"):
        raise ValueError(
            f"temperature_tau={given['temperature_tau']} gives each token a temperature, which "
            "neither a reference nor old='stored' has; valid: kl_coefficient=0 and another old"
        )
    if given["dual_clip"]:
        check_number("dual_clip", given["dual_clip"], least=1)


def _parts(given: Mapping[str, object]) -> Parts:
    """The parts that the arguments of `policy`, by name, stand for."""
    ends = token_ids(given["sentence_ends"])
    bounds, scales, redistribute = _clip(given)
    weigh, correct, keys = _weigh(given)
    measured = given["released"] and given["token_weight"] == "group_divergence"
    if measured:
        keys = ()
    if given["clip"] == "entropy" and "behaviour_entropy" not in keys:
        keys += ("behaviour_entropy",)
    loss, carried = tempered(given["sampling_temperature"]), {}
    if given["temperature_tau"]:
        loss, carried = tempered_by_token(given["sampling_temperature"]), _temper(given)
        keys += (TEMPERATURES,)
    surrogate = given["surrogate"]
    return Parts(
        advantages=_advantages(given),
        ratio=make_ratio(given["ratio"], given["detach_prefix"], ends),
        surrogate=make_surrogate(surrogate, given["tau_positive"], given["tau_negative"]),
        clips=surrogate,
        aggregation=make_aggregation(given["aggregation"], given["length"]),
        bounds=bounds,
        old=given["old"],
        largest=given["max_log_ratio"],
        batch_keys=keys,
        scales=scales,
        weigh=weigh,
        measures={"group_divergence": group_divergence} if measured else {},
        weighs_kl=measured,
        drops=given["mean_over"] == "kept",
        correct=correct,
        redistribute=redistribute,
        kl=given["kl"],
        kl_coefficient=given["kl_coefficient"],
        kl_in_reward=given["kl_in"] == "reward",
        entropy_coefficient=given["entropy_coefficient"],
        loss=loss,
        **carried,
    )


def _advantages(given: Mapping[str, object]) -> advantages.Advantages:
    made = {
        "group_normalised": lambda: advantages.group_normalised(given["ddof"], given["epsilon"]),
        "token_normalised": lambda: advantages.token_normalised(given["ddof"], given["epsilon"]),
        "centred": advantages.centred,
        "leave_one_out": advantages.leave_one_out,
        "rewards": lambda: advantages.rewards_themselves(given["baseline"]),
    }[given["advantage"]]()
    return advantages.most_varied(made, given["keep_answers"]) if given["keep_answers"] else made


def _clip(given: Mapping[str, object]):
    """(bounds, scales, redistribute) of `Parts`."""
    low, high, dual = given["clip_low"], given["clip_high"], given["dual_clip"]
    if given["clip"] == "constant":
        return lambda answers, rows: clipping.constant(low, high, dual), None, None
    if given["clip"] == "position":
        power = given["clip_power"]
        return lambda answers, rows: clipping.by_position(answers, low, high, power), None, None

    def scales(answers, batch):
        entropy_BT = batch["behaviour_entropy"]
        found = relative_entropy(answers, entropy_BT, given["entropy_pivot"], given["released"])
        return {"relative_entropy": found}

    def bounds(answers, rows):
        return clipping.by_entropy(rows["relative_entropy"], low, high, dual)

    def redistribute(advantages_BT, ratio_BT, rows):
        strength, relative_BT = given["redistribution"], rows["relative_entropy"]
        of_token = bounds(None, rows)
        sizes = 1 - of_token.low, of_token.high - 1
        return redistributed(advantages_BT, ratio_BT, relative_BT, strength, *sizes)

    return bounds, scales, redistribute if given["redistribution"] else None


def _temper(given: Mapping[str, object]) -> dict[str, object]:
    """What of `Parts` gives tokens temperatures by the entropies of the batch before."""

    def carry(answers, batch):
        entropy_BT = batch["behaviour_entropy"]
        return entropy_scale(answers, entropy_BT, given["entropy_pivot"], given["released"])

    def temper(scale, entropy_B):
        return temperature_factors(scale, entropy_B, given["temperature_tau"])

    return {"init": no_scale, "carry": carry, "temper": temper}


def _weigh(given: Mapping[str, object]):
    """(weigh, correct, keys of the batch) of `Parts`."""
    name = given["token_weight"]
    share, last = given["keep_tokens"], given["keep_tokens_last"]

    def by_divergence(answers, batch, advantages_BT, step):
        ids_BT, divergence_BT = batch["group_ids"], batch["group_divergence"]
        return token_weights.group_divergence(answers, ids_BT, divergence_BT, given["alpha"])

    def by_advantage_and_entropy(answers, batch, advantages_BT, step):
        now = token_weights.linear_schedule(share, last, given["keep_tokens_steps"], step)
        entropy_BT = batch["behaviour_entropy"]
        return token_weights.by_advantage_and_entropy(answers, advantages_BT, entropy_BT, now)

    def by_entropy(answers, batch, advantages_BT, step):
        return token_weights.by_entropy_quantile(answers, batch["behaviour_entropy"], share)

    def correct(log_k_BT):
        return token_weights.icepop(log_k_BT, given["k_low"], given["k_high"])

    return {
        "none": (None, None, ()),
        "icepop": (None, correct, ()),
        "group_divergence": (by_divergence, None, ("group_divergence",)),
        "advantage_entropy": (by_advantage_and_entropy, None, ("behaviour_entropy",)),
        "entropy_quantile": (by_entropy, None, ("behaviour_entropy",)),
    }[name]
