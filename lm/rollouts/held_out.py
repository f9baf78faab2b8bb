"""Held-out problems, answered greedily and judged: what a policy gradient is for.

R rows of a batch of answers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lm.data.problems import problems
from lm.parallel.mesh import share
from lm.rollouts.answering import Answering
from lm.rollouts.judge import Judge
from lm.rollouts.judging import score, solved
from lm.rollouts.policy_source import longest_prompt
from lm.rollouts.problem_prompts import askable, prompt_of, room_for
from lm.training.experiment import Data, Experiment


class HeldOut:
    """(trained, quantized, between) -> figures of the answers to the same problems every time.

    Compiled once in each phase. `between` is called before each batch of answers.

    Args:
      built: the run; `evaluation.problems` says how many.
      data: corpora and tokenizer.
      judge: of the run.

    Raises:
      InputError: the held-out documents are no problems, or none can be asked.
    """

    def __init__(self, built: Experiment, data: Data, judge: Judge):
        c = built.config
        asked = askable(problems(data.validation), data.tokenizer, longest_prompt(c))
        # Of several corpora some of each, whatever their order.
        order = np.random.default_rng(0).permutation(len(asked.kept))[: c.evaluation.problems]
        self._problems = [asked.problems[i] for i in asked.kept[order]]
        self._room = room_for(int(asked.lengths[order].max()))
        self._built, self._tokenizer, self._judge = built, data.tokenizer, judge
        self._rows, self._share = c.train.batch_size, share(built.mesh)
        self._answering = Answering(built, data.tokenizer, temperature=0.0)

    def __call__(
        self, trained: Any, quantized: bool, between: Callable[[], Any]
    ) -> dict[str, float]:
        """The mean reward of the answers that have one, and the share that solves its problem."""
        config = self._built.config
        rewards, right = [], []
        for start in range(0, len(self._problems), self._rows):
            between()
            index, count = self._share
            batch = self._problems[start : start + self._rows]
            size = self._rows // count
            # The last batch is filled with what is not counted.
            filled = batch + [batch[-1]] * (self._rows - len(batch))
            own = filled[index * size : (index + 1) * size]
            prompts = [prompt_of(problem, self._tokenizer) for problem in own]
            written = self._answering(trained, quantized, prompts, self._room, 0)
            records = [problem.record for problem in own]
            nothing = np.zeros((size, 0))
            scored = score(self._built.mesh, self._judge, written.texts, records, nothing)
            rewards += scored.total_N[: len(batch)].tolist()
            right += solved(config, scored)[: len(batch)].tolist()
        there = [reward for reward in rewards if np.isfinite(reward)]
        mean = float(np.mean(there)) if there else float("nan")
        return {"reward": mean, "solved": float(np.mean(right)), "problems": len(right)}
