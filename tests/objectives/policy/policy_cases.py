"""Drawn answers as lists of numbers, the rows that hold them, and objectives on them.

B rows, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from objectives.cross_entropy import TokenStatistics
from objectives.objective import Objective
from objectives.policy import POLICY
from objectives.terms import minimise

LENGTHS = (3, 5, 1, 4, 2, 6, 3, 2)
GROUPS = (7, 7, 7, 7, 2, 2, 2, 2)
ADVANTAGES = (1.5, -0.5, -0.5, 0.7, -1.2, 0.9, 0.0, 0.4)
PROMPT, LENGTH = 2, 20
# Answers of each row.
ROWS = ((0, 3), (1,), (2, 4, 6), (5, 7))
ENTROPIES = ("behaviour_entropy", "group_divergence")
# Every method, and what has a path of its own.
METHODS = {name: factory() for name, factory in POLICY.items()} | {
    "gspo token": POLICY["gspo"](token_form=True),
    "sspo sentences": POLICY["sspo"](sentence_ends="3", clip_low=0.1, clip_high=0.2),
    "sspo entropy": POLICY["sspo"](
        sentence_ends="3", clip_low=0.1, clip_high=0.2, entropy_clip=True
    ),
    "minpro clipped": POLICY["minpro"](clip_low=0.2, clip_high=0.2),
    "ctpo mean": POLICY["ctpo"](ratio="cumulative_mean"),
    "grpo k3": POLICY["grpo"](kl_coefficient=0.3, dual_clip=3.0, entropy_coefficient=0.1),
    "rloo k1": POLICY["rloo"](kl_coefficient=0.3),
    "policy k2": POLICY["policy"](kl="k2", kl_coefficient=0.2, aggregation="sequence_sum"),
    "icepop stored": POLICY["icepop"](old="stored"),
    "d3s half": POLICY["d3s"](keep_tokens=0.5, mean_over="kept"),
    "d3s schedule": POLICY["d3s"](keep_tokens=0.9, keep_tokens_last=0.3, keep_tokens_steps=10),
    "hapo released": POLICY["hapo"](released=True),
    "quantile": POLICY["policy"](token_weight="entropy_quantile", keep_tokens=0.2),
    "ppo kl": POLICY["ppo"](0.9, 0.8, "group", kl_coefficient=0.1, whiten=True),
    "ppo answer": POLICY["ppo"](0.9, 0.8, "answer", entropy_coefficient=0.1),
}
# Arrays that an answer has a number a token of: name -> (lowest, highest).
RANGES = {
    "log_p": (-2.5, -0.05),
    "drift": (-0.3, 0.3),
    "mismatch": (-0.9, 0.9),
    "reference_nll": (0.1, 2.5),
    "entropy": (0.1, 1.5),
    "behaviour_entropy": (0.1, 1.5),
    "group_divergence": (0.0, 1.0),
    "temperatures": (0.5, 2.0),
    "value": (-1.0, 1.0),
    "targets": (0, 5),
}


def draw(seed=0, lengths=LENGTHS) -> dict[str, list[np.ndarray]]:
    """Numbers of the tokens of each answer, by name."""
    rng = np.random.default_rng(seed)
    found = {
        name: [rng.uniform(low, high, n) for n in lengths] for name, (low, high) in RANGES.items()
    }
    found["targets"] = [np.floor(x) for x in found["targets"]]
    # Clipped below and above, and inside of the narrowest bounds.
    for answer, place, drift in ((1, 0, -0.29), (0, 1, 0.28), (2, 0, 0.01)):
        if answer < len(lengths):
            found["drift"][answer][place] = drift
    # The sampler is close to the policy, as in a later step on what was drawn.
    pairs = zip(found["log_p"], found["drift"], strict=True)
    found["behaviour_log_probability"] = [a - b for a, b in pairs]
    pairs = zip(found["behaviour_log_probability"], found["mismatch"], strict=True)
    found["old_log_probability"] = [a + b for a, b in pairs]
    found["advantages"] = [
        np.full(n, a) for n, a in zip(lengths, ADVANTAGES[: len(lengths)], strict=True)
    ]
    found["rewards"] = [x + 1 for x in found["advantages"]]
    found["group_ids"] = [
        np.full(n, g) for n, g in zip(lengths, GROUPS[: len(lengths)], strict=True)
    ]
    return found


def make_inputs(numbers, rows=ROWS, length=LENGTH, other=np.nan, prompt=PROMPT):
    """(what the statistics have, batch, references), `other` at what was not drawn."""
    shape = len(rows), length
    integers = ("targets", "group_ids")
    arrays = {name: np.full(shape, other, np.float32) for name in numbers}
    arrays |= {name: np.zeros(shape, np.int32) for name in integers}
    arrays["group_ids"][:] = -1
    batch = {"weights": np.zeros(shape, np.float32), "segment_ids": np.zeros(shape, np.int32)}
    for row, answers in enumerate(rows):
        start = 0
        for segment, answer in enumerate(answers, 1):
            size = len(numbers["log_p"][answer])
            batch["segment_ids"][row, start : start + prompt + size] = segment
            start += prompt
            batch["weights"][row, start : start + size] = 1
            for name, of_answers in numbers.items():
                arrays[name][row, start : start + size] = of_answers[answer]
            start += size
    read = {name: arrays.pop(name) for name in ("log_p", "entropy", "value")}
    references = {"reference_nll": arrays.pop("reference_nll")}
    return jax.tree.map(jnp.asarray, (read, batch | arrays, references))


def statistics(objective: Objective, read) -> TokenStatistics:
    """Statistics as a model's; there are values where the objective has a value head."""
    log_p, nothing = read["log_p"], jnp.full_like(read["log_p"], jnp.nan)
    found = TokenStatistics(-log_p, nothing, read["entropy"], log_p)
    return found if objective.loss.is_nll else found._replace(value=read["value"])


def value_and_terms(objective: Objective, read, batch, references, step=3):
    """(what is minimised, every term and metric) of a whole batch."""
    found = statistics(objective, read)
    seen = found if objective.whole_batch else None
    prepared = objective.prepare(seen, {}, batch, references, (), step)
    value, terms = minimise(objective.terms(found, {}, batch, prepared))
    return value, {**terms, **prepared.metrics}


def run(objective: Objective, inputs):
    """((value, terms), gradient in what the statistics have).

    Not compiled as a whole: operations of the same shapes are shared by all objectives.
    """
    grads = jax.value_and_grad(
        lambda read, *others: value_and_terms(objective, read, *others), has_aux=True
    )
    return grads(*inputs)
