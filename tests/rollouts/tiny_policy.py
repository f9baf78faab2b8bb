"""A policy gradient small enough for a test, and a judge without a process."""

import jax
import numpy as np
import tiny

from lm.data.problems import problems
from lm.rollouts.judge import Judged
from lm.rollouts.policy_source import PolicySource
from lm.training import experiment

GROUP, TOKENS, LENGTH, TEMPERATURE = 4, 6, 32, 0.7

# With the end of text alone nearly all answers of a fresh model would have full length.
ENDS = (256, *range(60, 90))


def config(**overrides):
    """GRPO on sums: 8 rows with 2 answers each, in 4 groups."""
    given = {
        "model__layers": 1,
        "data__corpus": "task:sums/200",
        "data__sequence_length": LENGTH,
        "objective__name": "grpo",
        "rollouts__group": GROUP,
        "rollouts__tokens": TOKENS,
        "rollouts__temperature": TEMPERATURE,
    }
    return tiny.config(**{**given, **overrides})


class LengthJudge:
    """The reward of an answer is the number of its characters; what `fails` says has none."""

    def __init__(self, fails=lambda text, record: False, reward=lambda text, record: len(text)):
        self.fails, self.reward, self.seen = fails, reward, []

    def judge(self, texts, records):
        self.seen.append((list(texts), list(records)))
        pairs = list(zip(texts, records, strict=True))
        failed = np.array([self.fails(*pair) for pair in pairs])
        total = np.where(failed, np.nan, [self.reward(*pair) for pair in pairs])
        return Judged(
            total, {"exact": total}, {"raised": int(failed.sum())} if failed.any() else {}
        )


class Run:
    """An experiment with a fresh train state whose distributions are not all alike."""

    def __init__(self, c, devices=1):
        self.config, self.data = c, experiment.load_data(c.data)
        self.built = experiment.build(c, self.data.tokenizer.vocab_size, jax.devices()[:devices])
        shardings = jax.tree.map(lambda x: x.sharding, self.built.abstract_state())
        with jax.set_mesh(self.built.mesh):
            state = jax.jit(self.built.init, out_shardings=shardings)(jax.random.key(0))
            params = jax.tree.map(lambda x: 2 * x, state.trained.params)
        self.state = state._replace(trained=state.trained._replace(params=params))

    def source(self, judge=None):
        texts = problems(self.data.train)
        said = []
        judge = judge or LengthJudge()
        source = PolicySource(self.built, texts, self.data.tokenizer, judge, said.append)
        source.said, source._answering._ends = said, ENDS
        return source

    def batch(self, source, step=0):
        with jax.set_mesh(self.built.mesh):
            return jax.device_get(source.next(step, self.state))


def answers(batch):
    """(row, places of the drawn targets) of every answer with a weight, in order."""
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            yield row, np.flatnonzero((ids == segment) & (batch["weights"][row] != 0))
