"""Every objective once more, answer by answer in NumPy float64, from its definition.

A function (x, at) -> value, x and at of `preference_cases.Case`: what is a constant to gradients is
taken of `at`, so that finite differences in x are the gradient.
"""

import numpy as np


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def softplus(x):
    """-log sigmoid(-x)."""
    return np.logaddexp(0, x)


def ratios(x, side, name="reference_nll"):
    """log p - log p_reference of the tokens, answer by answer."""
    pairs = zip(getattr(x.log_p, side), getattr(x.known[name], side), strict=True)
    return [a + b for a, b in pairs]


def pairs(x, side, name):
    """(log p - log p_reference, another value) of the tokens, answer by answer."""
    return zip(ratios(x, side), getattr(x.known[name], side), strict=True)


def total(arrays):
    """The sum over every answer."""
    return np.array([np.sum(a) for a in arrays])


def mean(arrays):
    """The mean over every answer."""
    return np.array([np.mean(a) for a in arrays])


def both(x):
    """Sums of log-ratios of both sides."""
    return total(ratios(x, "chosen")), total(ratios(x, "rejected"))


def chosen_nll(x):
    """The mean over all tokens of chosen answers."""
    return -np.mean(np.concatenate(x.log_p.chosen))


def dpo(x, at, beta=0.1):
    w, s = both(x)
    return np.mean(softplus(-beta * (w - s)))


def conservative(x, at, beta=0.3, eps=0.2):
    h = beta * np.subtract(*both(x))
    return np.mean((1 - eps) * softplus(-h) + eps * softplus(h))


def robust(x, at, beta=0.3, eps=0.2):
    h = beta * np.subtract(*both(x))
    return np.mean(((1 - eps) * softplus(-h) - eps * softplus(h)) / (1 - 2 * eps))


def plain(x, at, beta=0.3):
    w, s = mean(x.log_p.chosen), mean(x.log_p.rejected)
    return np.mean(softplus(-beta * (w - s)))


def ipo(x, at, beta=0.2):
    return np.mean((np.subtract(*both(x)) - 1 / (2 * beta)) ** 2)


def kto(x, at, beta=0.3, wanted=1.3, unwanted=0.6):
    w, s = both(x)
    z = max(0, np.mean(total(ratios(at, "mismatched"))))
    losses = [wanted * (1 - sigmoid(beta * (w - z))), unwanted * (1 - sigmoid(beta * (z - s)))]
    return np.mean(np.concatenate(losses))


def orpo(x, at, beta=0.4):
    w, s = np.exp(mean(x.log_p.chosen)), np.exp(mean(x.log_p.rejected))
    odds = np.log(w / (1 - w)) - np.log(s / (1 - s))
    return chosen_nll(x) + beta * np.mean(softplus(-odds))


def simpo(x, at, beta=2.0, gamma=0.5):
    return np.mean(softplus(gamma - beta * (mean(x.log_p.chosen) - mean(x.log_p.rejected))))


def cpo(x, at, beta=0.1, alpha=0.7):
    margin = beta * (total(x.log_p.chosen) - total(x.log_p.rejected))
    return np.mean(softplus(-margin)) + alpha * chosen_nll(x)


def tgdpo(x, at, beta=0.1, alpha=0.5):
    def side(name, sign):
        found = []
        for i, u in enumerate(ratios(x, name)):
            reward = getattr(at.known["reference_nll"], name)[i]
            reward = reward - getattr(at.known["reward_nll"], name)[i]
            found.append(np.sum(u * (1 + sign * alpha * beta * reward)))
        return np.array(found)

    return np.mean(softplus(-beta * (side("chosen", 1) - side("rejected", -1))))


def treg(x, at, beta=0.1, alpha=0.25):
    w, s = both(at)
    share = sigmoid(beta * (s - w))
    found = 0
    for side in ("chosen", "rejected"):
        for v, log_p, better, worse in zip(
            share,
            getattr(x.log_p, side),
            getattr(at.known["better_nll"], side),
            getattr(at.known["worse_nll"], side),
            strict=True,
        ):
            reward = sigmoid(worse - better) - 0.5
            found += v * np.sum(-beta * reward * log_p)
    return dpo(x, at, beta) + alpha * found / len(share)


def cdpo(x, at, beta=0.1):
    w = total(ratios(x, "chosen"))
    s = total([u * (1 - p) for u, p in pairs(x, "rejected", "contrast_probability")])
    return np.mean(softplus(-beta * (w - s)))


def cdpo_places(x, at, beta=0.1):
    """As released, both sides weighted."""
    chosen = [u * p for u, p in pairs(x, "chosen", "contrast_probability")]
    rejected = [u * (1 - p) for u, p in pairs(x, "rejected", "contrast_probability")]
    places = []
    for w, s in zip(chosen, rejected, strict=True):
        size = max(len(w), len(s))
        places += list(np.pad(w, (0, size - len(w))) - np.pad(s, (0, size - len(s))))
    return np.mean(softplus(-beta * np.array(places)))


def sparse_po(x, at, beta=0.1, factor=1.0):
    w, s = both(x)
    delta_w, delta_l = (total(getattr(x.known["divergence"], n)) for n in ("chosen", "rejected"))
    return np.mean(softplus(-beta * ((w - s) - factor * (delta_l - delta_w))))


def bco(x, at, beta=0.2, before=(0.0, 0.0), sides=True, matched=False):
    now = beta * np.concatenate(both(at))
    delta = (before[0] * before[1] + now.sum()) / (before[1] + len(now))
    w, s = (beta * u for u in both(x))
    wanted, unwanted = softplus(delta - w), softplus(s - delta)
    if matched:
        p = mean(at.known["desirable_probability"].rejected)
        unwanted = unwanted * np.clip(p / (1 - p), 0.5, 10)
    if sides:
        return np.mean(wanted) + np.mean(unwanted)
    return np.mean(np.concatenate([wanted, unwanted]))


def npo(x, at, beta=0.1, gamma=0.8, alpha=0.6):
    forget = np.mean(2 / beta * softplus(beta * both(x)[1]))
    return gamma * forget + alpha * chosen_nll(x)


def npo_kl(x, at, beta=0.1):
    forget = np.mean(2 / beta * softplus(beta * both(x)[1]))
    return forget + np.mean(np.concatenate(x.known["divergence"].chosen))


def sim_npo(x, at, beta=4.5, delta=0.3, gamma=0.125, alpha=1.0):
    forget = np.mean(2 / beta * softplus(beta * (mean(x.log_p.rejected) + delta)))
    return gamma * forget + alpha * chosen_nll(x)
