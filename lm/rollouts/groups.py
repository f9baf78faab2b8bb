"""Groups of answers to one problem: which of them say something, and what all of them say.

G answers of a group, N answers of a rollout.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.rollouts.judging import Scored, solved


def has_signal(rewards_N: np.ndarray, group: int) -> np.ndarray:
    """Whether the rewards of each group differ, bool [N / G].

    Where all are equal, an advantage relative to the group is 0. A reward that is NaN is left out;
    a group with fewer than two others has no signal.

    Args:
      rewards_N: those of a group stand next to each other.
      group: G.
    """
    rewards_GN = np.asarray(rewards_N, np.float64).reshape(-1, group)
    there_GN = np.isfinite(rewards_GN)
    highest = np.max(rewards_GN, axis=1, where=there_GN, initial=-np.inf)
    lowest = np.min(rewards_GN, axis=1, where=there_GN, initial=np.inf)
    return highest > lowest


def chosen_groups(signals: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """For each group of a batch, (draw, group of that draw): dynamic sampling.

    The first draw, in which groups without signal are replaced by those of later draws that have
    one, as long as there are some (DAPO, arXiv 2503.14476, equation 11, which draws on until the
    batch is full).

    Args:
      signals: of each draw, whether its groups have a signal.
    """
    chosen = [(0, group) for group in range(len(signals[0]))]
    lacking = ~signals[0]
    for draw, found in enumerate(signals[1:], 1):
        others = np.flatnonzero(found).tolist()
        for place, other in zip(np.flatnonzero(lacking).tolist(), others, strict=False):
            chosen[place] = draw, other
            lacking[place] = False
    return chosen


def rollout_metrics(
    config: Any,
    scored: Scored,
    signals: Sequence[np.ndarray],
    chosen: Sequence[tuple[int, int]],
) -> dict[str, np.float32]:
    """What a line of metrics says of a rollout.

    All but the last two are of the first draw, so that they are those of the policy, whatever is
    drawn again: reward and its deviation over all answers that have one; each reward by name, where
    there are several; the share that solves its problem (`lm.rollouts.judging.solved`), of all
    answers; the share of groups without signal; tokens of an answer; the share that ended by
    itself; the number of answers without a reward, by reason; answers that were drawn.

    Args:
      config: of the run.
      scored: the first draw, further columns being lengths and whether an answer ended.
      signals, chosen: see `chosen_groups`.
    """
    names = [name.strip() for name in config.rollouts.rewards.split(",")]
    rewards = scored.total_N[np.isfinite(scored.total_N)]
    found = {
        "reward": rewards.mean() if len(rewards) else np.nan,
        "reward_std": rewards.std() if len(rewards) else np.nan,
        "solved": solved(config, scored).mean(),
        "groups_without_signal": 1 - signals[0].mean(),
        "response_length": scored.further_NK[:, 0].mean(),
        "ended": scored.further_NK[:, 1].mean(),
    }
    if len(names) > 1:
        for name, values in scored.by_name.items():
            there = values[np.isfinite(values)]
            found[f"reward_{name}"] = there.mean() if len(there) else np.nan
    found |= {f"failed_{reason}": count for reason, count in scored.failed.items()}
    if config.rollouts.dynamic:
        found["draws"] = len(signals)
        found["replaced_groups"] = sum(draw > 0 for draw, _ in chosen)
    return {name: np.float32(value) for name, value in found.items()}
