"""What the answers of all processes are worth, each judged by the process that has it.

N answers over all processes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm.parallel.cross_process import of_all_shares
from lm.rollouts.judge import REASONS, Judge
from lm.rollouts.make_rewards import make_rewards
from objectives import Objective


@contextlib.contextmanager
def judging(config: ConfigDict, objective: Objective) -> Iterator[Judge | None]:
    """The judge of a run; its process ends with the context. None where nothing is judged.

    Raises:
      InputError: a key of the rewards is wrong.
    """
    rewards = make_rewards(config.rollouts)
    if objective.advantages is None and not config.evaluation.problems:
        yield None
        return
    with Judge(rewards, config.rollouts.reward_seconds) as judge:
        yield judge


class Scored(NamedTuple):
    """The rewards of N answers, the same on every process.

    Attributes:
      total_N: float64, NaN where a reward failed.
      by_name: name of a reward -> float64 [N].
      failed: number of answers without a reward, by reason.
      further_NK: float64, what was given of each answer besides.
    """

    total_N: np.ndarray
    by_name: Mapping[str, np.ndarray]
    failed: Mapping[str, int]
    further_NK: np.ndarray


def score(
    mesh: Mesh,
    judge: Judge,
    texts: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    further_NK: np.ndarray,
) -> Scored:
    """Judges this process's answers, and gathers those of all; all processes have to ask.

    Args:
      mesh: the mesh.
      judge: of the run.
      texts: answers of this process's share, as many in every share.
      records: of their problems.
      further_NK: K numbers of each of them, gathered along with the rewards.
    """
    judged = judge.judge(texts, records)
    names = sorted(judged.by_name)
    columns = [judged.total_N, *(judged.by_name[name] for name in names)]
    own_NK = np.column_stack([*columns, further_NK]).astype(np.float64)
    failed = np.array([judged.failed.get(reason, 0) for reason in REASONS], np.float64)
    all_NK = of_all_shares(mesh, own_NK).reshape(-1, own_NK.shape[1])
    counts = of_all_shares(mesh, failed).sum(axis=0)
    return Scored(
        all_NK[:, 0],
        {name: all_NK[:, 1 + i] for i, name in enumerate(names)},
        {reason: int(count) for reason, count in zip(REASONS, counts, strict=True)},
        all_NK[:, 1 + len(names) :],
    )


def solved(config: ConfigDict, scored: Scored) -> np.ndarray:
    """Whether each answer solves its problem, bool [N]: the first of `rollouts.rewards` is >= 1.

    That is before its weight. A reward that has failed solves nothing.
    """
    return scored.by_name[config.rollouts.rewards.split(",")[0].strip()] >= 1
