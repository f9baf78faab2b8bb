"""Every distillation in float64 NumPy with whole arrays of logits, and derivatives by differences.

N tokens, D width, V vocabulary.
"""

import numpy as np


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def pick(x_NV, y_N):
    return x_NV[np.arange(len(y_N)), y_N]


def without(x_NV, y_N):
    """The columns of each row but for one of them."""
    keep = np.arange(x_NV.shape[1]) != y_N[:, None]
    return x_NV[keep].reshape(len(x_NV), -1)


def forward(log_p, log_q):
    return (np.exp(log_q) * (log_q - log_p)).sum(-1)


def reverse(log_p, log_q):
    return forward(log_q, log_p)


def jensen_shannon(log_p, log_q, mixing):
    log_m = np.log(mixing * np.exp(log_q) + (1 - mixing) * np.exp(log_p))
    return mixing * forward(log_m, log_q) + (1 - mixing) * forward(log_m, log_p)


def distillation(s, divergence="forward", mixing=0.5, temperature=1.0, share=1.0):
    log_p, log_q = (log_softmax(x / temperature) for x in (s["z"], s["u"][0]))
    apart = {
        "forward": lambda: forward(log_p, log_q),
        "reverse": lambda: reverse(log_p, log_q),
        "jensen_shannon": lambda: jensen_shannon(log_p, log_q, mixing),
    }[divergence]()
    return share * temperature**2 * apart + (1 - share) * nll(s)


def nll(s):
    return -pick(log_softmax(s["z"]), s["y"])


def nkd(s, gamma=1.5, temperature=1.0):
    z, u = (without(x, s["y"]) / temperature for x in (s["z"], s["u"][0]))
    target = np.exp(pick(log_softmax(s["u"][0]), s["y"])) * nll(s)
    others = -(np.exp(log_softmax(u)) * log_softmax(z)).sum(-1)
    return target + gamma * temperature**2 * others


def pld(s, top=64):
    z, u, q = s["z"], s["u"][0], np.exp(log_softmax(s["u"][0]))
    losses = []
    for row, y in enumerate(s["y"]):
        others = [v for v in np.argsort(-u[row]) if v != y]
        order = np.array([y, *others])
        losses.append(0.0)
        for k in range(min(top + 1, len(order))):
            after = np.log(np.exp(z[row, order[k:]]).sum())
            losses[-1] -= q[row, order[k]] * (z[row, order[k]] - after)
    return np.array(losses)


def dhkd(s, divergence="binary_kl_norm", temperature=2.0, gamma=1.0, alpha=1.0):
    a, t = s["second"], s["u"][0]
    logistic = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    if divergence == "binary_kl_norm":
        target, given = np.full_like(a, 0.5), logistic((a - t) / temperature)
    else:
        target, given = logistic(t / temperature), logistic(a / temperature)
    kl = target * np.log(target / given) + (1 - target) * np.log((1 - target) / (1 - given))
    return gamma * nll(s) + alpha * temperature**2 * kl.sum(-1)


def nd(s, factor=2.0, kd=1.0, temperature=1.0):
    centres = s["heads"][0][:, s["y"]].T
    centres = centres / np.linalg.norm(centres, axis=-1, keepdims=True)
    longest = np.maximum(*(np.linalg.norm(x, axis=-1) for x in (s["hidden"], s["hiddens"][0])))
    apart = 1 - (s["hidden"] * centres).sum(-1) / longest
    log_p, log_q = (log_softmax(x / temperature) for x in (s["z"], s["u"][0]))
    return nll(s) + kd * temperature**2 * forward(log_p, log_q) + factor * apart


def dac_kl(s, lower=0.0, upper=1.0):
    q = np.clip(np.exp(log_softmax(s["u"][0])), lower, upper)
    return forward(log_softmax(s["z"]), np.log(q / q.sum(-1, keepdims=True)))


def align_distil(s, beta=0.1, beta2=10.0, temperature=1.0, adaptive=True):
    a, b = s["u"]
    if adaptive:
        apart = np.abs(np.exp(log_softmax(a)) - np.exp(log_softmax(b))).sum(-1)
        w = beta2 * apart + 1e-3
        line, factor = w[:, None] * (a - b) + a, beta / w
    else:
        line, factor = beta / beta2 * a + (1 - beta / beta2) * b, beta2
    return factor * reverse(log_softmax(s["z"]), log_softmax(line / temperature))


def block_distillation(s):
    return distillation(s)


def self_knowledge(s, beta=0.1, mu=0.005, top=64, rank="probabilities"):
    """The terms of the other tokens and of the weak head."""
    log_p, log_w, y = log_softmax(s["z"]), log_softmax(s["second"]), s["y"]
    of_model = np.exp(log_p) / (1 - np.exp(pick(log_p, y)) + 1e-6)[:, None]
    if rank == "released":
        of_model = log_p / (1 - pick(log_p, y) + 1e-6)[:, None]
    score = s.get("score", of_model + np.exp(log_w) / (1 - np.exp(pick(log_w, y)) + 1e-6)[:, None])
    s["score"] = score  # The ranks are not differentiated: those of the first call stay.
    places = np.argsort(np.argsort(-score, axis=-1), axis=-1)
    labels = without(np.where(places < top, 1 / (1 + places), 0.0), y)
    labels = labels / labels.sum(-1, keepdims=True)
    others = -(labels * log_softmax(without(s["z"], y))).sum(-1)
    weak = -0.9 * pick(log_w, y) - 0.1 * log_w.mean(-1)
    return beta * others + mu * weak


def losses(method, hidden, head, y, teachers, second=None, state=None, **hyper):
    """[N] of a method; `teachers` is a list of (hidden [N, Dt], head [Dt, V])."""
    s = {} if state is None else state
    s |= {"hidden": hidden, "z": hidden @ head, "y": y}
    s |= {"hiddens": [t for t, _ in teachers], "heads": [w for _, w in teachers]}
    s["u"] = [t @ w for t, w in teachers]
    if second is not None:
        s["second"] = hidden @ second
    return method(s, **hyper)


def gradients(f, *arrays, step=1e-5):
    """Central differences of a function of float64 arrays."""
    found = []
    for number, array in enumerate(arrays):
        slope = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in arrays]
                moved[number][index] += sign * step
                ends.append(f(*moved))
            slope[index] = (ends[0] - ends[1]) / (2 * step)
        found.append(slope)
    return found
