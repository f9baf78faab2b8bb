"""Policy gradients answer by answer, in NumPy float64, from the equations as papers write them.

An answer is one array a name. What carries no gradient is read from `fixed`, which finite
differences leave as it is.
"""

import math

import numpy as np

RATIOS = {
    "token": lambda p, fixed, old: p - old,
    "sequence": lambda p, fixed, old: np.full(len(p), np.mean(p - old)),
    "sequence_token": lambda p, fixed, old: np.mean(fixed - old) + p - fixed,
    "cumulative": lambda p, fixed, old: np.cumsum(fixed - old) + p - fixed,
    "cumulative_mean": lambda p, fixed, old: (
        np.cumsum(fixed - old) / np.arange(1, len(p) + 1) + p - fixed
    ),
    "prefix_min": lambda p, fixed, old: (
        p - old + [0.0, *np.minimum.accumulate(fixed - old)][: len(p)]
    ),
}
KLS = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: np.exp(-x) - 1 + x,
}


def of_sentences(targets, end):
    """The log ratio of SSPO: means over what ends with the token `end`."""
    numbers = np.cumsum([0, *(targets[:-1] == end)])
    return lambda p, fixed, old: np.array([np.mean((p - old)[numbers == n]) for n in numbers])


def ppo(r, p, fixed_r, a, low, high, dual):
    gain = np.minimum(r * a, np.clip(r, low, high) * a)
    return -np.where(a < 0, np.maximum(gain, np.where(np.isinf(dual), 1e9, dual) * a), gain)


def cispo(r, p, fixed_r, a, low, high, dual):
    return -np.clip(fixed_r, low, high) * a * p


def reinforce(r, p, fixed_r, a, low, high, dual):
    return -a * p


def sapo(r, p, fixed_r, a, low, high, dual):
    tau = np.where(a > 0, 1.0, 1.05)
    return -4 / tau / (1 + np.exp(-tau * (r - 1))) * a


def average(losses, advantages, by, row_length):
    """What becomes of the losses of tokens; `by` is the name of an average."""
    sums, lengths = np.array([x.sum() for x in losses]), np.array([len(x) for x in losses])
    if by == "token":
        return sums.sum() / lengths.sum()
    if by == "sequence":
        return np.mean(sums / lengths)
    if by == "sum":
        return np.mean(sums)
    if by == "fixed":
        return np.mean(sums) / row_length
    signs = np.array([np.sign(a.sum()) for a in advantages])
    found = 0.0
    for sign in (-1, 0, 1):
        if (signs == sign).any():
            own = signs == sign
            found += own.mean() * sums[own].sum() / lengths[own].sum()
    return found


def loss(
    x,
    fixed,
    ratio="token",
    bounds=None,
    low=0.2,
    high=0.2,
    dual=math.inf,
    surrogate=ppo,
    by="token",
    old="behaviour_log_probability",
    sampler_weight=None,
    weights=None,
    kept=None,
    scale=None,
    kl=None,
    beta=0.0,
    kl_in="loss",
    entropy=0.0,
    advantages=None,
    row_length=0,
):
    """The loss of lists of answers: `x` is what is differentiated, `fixed` the same and more."""
    losses, signed = [], []
    for i, p in enumerate(x["log_p"]):
        own = {name: values[i] for name, values in fixed.items()}
        before = own["log_p"] if old == "current" else own[old]
        function = of_sentences(own["targets"], 3) if ratio == "segment" else RATIOS[ratio]
        r = np.exp(function(p, own["log_p"], before))
        fixed_r = np.exp(function(own["log_p"], own["log_p"], before))
        a = own["advantages"] if advantages is None else advantages[i]
        sampler = own["behaviour_log_probability"]
        if beta and kl_in == "reward":
            cost = beta * KLS[kl](sampler + own["reference_nll"])
            a = a - np.cumsum(cost[::-1])[::-1]
        signed.append(a)
        lowest, highest, largest = 1 - low, 1 + high, dual
        if bounds is not None:
            lowest, highest, largest = bounds(i, len(p))
        if scale is not None:
            a = a * scale(i, fixed_r)
        one = surrogate(r, p, fixed_r, a, lowest, highest, largest)
        if weights is not None:
            one = one * weights[i]
        if sampler_weight is not None:
            one = one * sampler_weight(np.exp(before - sampler))
        if beta and kl_in == "loss":
            one = one + beta * KLS[kl](p + own["reference_nll"])
        losses.append(one - entropy * x["entropy"][i])
    if kept is not None:
        losses = [one[keep] for one, keep in zip(losses, kept, strict=True)]
    return average(losses, signed, by, row_length)


def whole(parts):
    """All tokens as one array, and how to cut it again."""
    cuts = np.cumsum([len(x) for x in parts])[:-1]
    return np.concatenate(parts), lambda array: np.split(array, cuts)


def relative_entropy(entropies, released=False):
    """HAPO's scale of all tokens, one array an answer."""
    entropy, cut = whole(entropies)
    e = np.log(entropy)
    h = e - np.quantile(e, 0.8, method="nearest")
    h = h / np.sqrt(np.mean(h**2))
    low = h.min() if released else -h.min()
    return cut(np.where(h > 0, h / max(h.max(), 1e-9), h / low))


def hapo(fixed, released=False):
    """Arguments of `loss` for HAPO."""
    h = relative_entropy(fixed["behaviour_entropy"], released)

    def bounds(i, length):
        low, high = 0.2 * (1 - np.minimum(h[i], 0)), 0.2 * (1 + np.maximum(h[i], 0))
        return 1 - low, 1 + high, 10.0

    def scale(i, r):
        lowest, highest, _ = bounds(i, len(r))
        inside = (r > (1 + lowest) / 2) & (r < (1 + highest) / 2)
        return 1 + np.where((h[i] > 0) != inside, h[i], 0.0)

    return {"bounds": bounds, "scale": scale}


def by_position(power, low=0.025, high=0.05):
    """Bounds of CTPO."""

    def bounds(i, length):
        size = np.arange(1, length + 1.0) ** power
        return np.exp(-low * size), np.exp(high * size), np.exp(high * size)

    return {"bounds": bounds}


def group_weights(fixed, alpha=1.7):
    """Weights of TW-GRPO."""
    groups = [g[0] for g in fixed["group_ids"]]
    found = []
    for group, x in zip(groups, fixed["group_divergence"], strict=True):
        members = zip(groups, fixed["group_divergence"], strict=True)
        own = np.concatenate([y for g, y in members if g == group])
        found.append(1 + (alpha - 1) * (x - own.min()) / (own.max() - own.min()))
    return found


def highest(parts, share):
    """Which of all tokens have the ceil(share n) highest scores, ties included."""
    scores, cut = whole(parts)
    count = math.ceil(share * len(scores) - 1e-9)
    return cut(scores >= np.sort(scores)[-count])


def ppo_with_values(
    x, fixed, gamma, lambda_, target, beta=0.0, whiten=False, entropy=0.0, coefficient=1.0
):
    """The loss of PPO, and that of its values."""
    advantages, targets = [], []
    for i, values in enumerate(fixed["value"]):
        rewards = np.zeros(len(values))
        rewards[-1] = fixed["rewards"][i][0]
        if beta:
            sampler = fixed["behaviour_log_probability"][i]
            rewards -= beta * (sampler + fixed["reference_nll"][i])
        after = np.append(values[1:], 0.0)
        delta = rewards + gamma * after - values
        a = np.array(
            [
                sum((gamma * lambda_) ** (s - t) * delta[s] for s in range(t, len(delta)))
                for t in range(len(delta))
            ]
        )
        advantages.append(a)
        group = [r[0] for r, g in zip(fixed["rewards"], fixed["group_ids"], strict=True)
                 if g[0] == fixed["group_ids"][i][0]]  # fmt: skip
        targets.append(
            {
                "return": a + values,
                "answer": np.full(len(a), fixed["rewards"][i][0]),
                "group": np.full(len(a), np.mean(group)),
            }[target]
        )
    if whiten:
        every, cut = whole(advantages)
        advantages = cut((every - every.mean()) / every.std())
    policy = loss(x, fixed, advantages=advantages, entropy=entropy)
    apart, _ = whole([v - t for v, t in zip(x["value"], targets, strict=True)])
    return policy + coefficient * np.mean(apart**2) / 2
