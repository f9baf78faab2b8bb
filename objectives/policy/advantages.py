"""Advantages of answers from their rewards, in NumPy: they are formed before the batch is.

N answers. All functions map (rewards float64 [N], numbers of the groups int [N], drawn tokens int
[N]) to float32 [N]. A group is the answers to one prompt. A reward of NaN marks an answer that
failed: it is left out of means and deviations, and its advantage is 0.
"""

from collections.abc import Callable

import numpy as np

from objectives.weighting.base import check_name, check_number

# (rewards [N], groups [N], lengths [N]) -> advantages [N]
Advantages = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def group_normalised(ddof: int = 1, epsilon: float = 1e-6) -> Advantages:
    """A = (R - mean of the group) / (standard deviation of the group + epsilon).

    GRPO (arXiv 2402.03300). A group of one answer, or of equal rewards, has advantages of 0.

    Args:
      ddof: 1 divides the squares by G - 1, as torch does; 0 by G.
      epsilon: added to the deviation, at least 0.

    Raises:
      ValueError: another `ddof`, a negative `epsilon`.
    """
    check_number("ddof", ddof, least=0, most=1)
    check_number("epsilon", epsilon, least=0)

    def of_group(rewards, lengths):
        if len(rewards) < 2:
            return np.zeros_like(rewards)
        return (rewards - rewards.mean()) / (rewards.std(ddof=ddof) + epsilon)

    return _by_group(of_group)


def token_normalised(ddof: int = 1, epsilon: float = 1e-6, largest: float = 5.0) -> Advantages:
    """A = (R - mean) / (standard deviation + epsilon), both over the tokens of the group: HAPO.

    Released code: starriver030515/HAPO. The reward of an answer counts once for each of its tokens;
    squares are divided by the number of tokens. A group in which some |A| is `largest` or more has
    the advantages of `group_normalised` instead.

    Args:
      ddof, epsilon: of `group_normalised`; the deviation over tokens has the same epsilon.
      largest: above 0.

    Raises:
      ValueError: another `ddof`, a negative `epsilon`, a `largest` that is not positive.
    """
    check_number("largest", largest, above=0)
    by_answers = group_normalised(ddof, epsilon)

    def of_group(rewards, lengths):
        mean = np.average(rewards, weights=lengths)
        deviation = np.sqrt(np.average(np.square(rewards - mean), weights=lengths))
        found = (rewards - mean) / (deviation + epsilon)
        if np.abs(found).max() >= largest:
            return by_answers(rewards, np.zeros(len(rewards), int), lengths)
        return found

    return _by_group(of_group)


def centred() -> Advantages:
    """A = R - mean of the group: Dr. GRPO (arXiv 2503.20783), without the deviation."""
    return _by_group(lambda rewards, lengths: rewards - rewards.mean())


def leave_one_out() -> Advantages:
    """A = R - mean of the others of the group: RLOO (arXiv 2402.14740).

    The baseline does not depend on the answer itself, so that the gradient is unbiased. A group of
    one answer has no others: its advantage is 0.
    """

    def of_group(rewards, lengths):
        others = len(rewards) - 1
        return (rewards - rewards.mean()) * (len(rewards) / others if others else 0.0)

    return _by_group(of_group)


def rewards_themselves(baseline: str = "none") -> Advantages:
    """A = R, or R - mean of the batch: REINFORCE. Groups do not matter.

    Args:
      baseline: none | batch.

    Raises:
      ValueError: an unknown name.
    """
    check_name("baseline", baseline, ("none", "batch"))

    def advantages(rewards, groups, lengths):
        del groups, lengths
        rewards = np.asarray(rewards, np.float64)
        live = ~np.isnan(rewards)
        found = np.zeros(len(rewards), np.float32)
        mean = rewards[live].mean() if baseline == "batch" and live.any() else 0.0
        found[live] = rewards[live] - mean
        return found

    return advantages


def most_varied(advantages: Advantages, keep: int) -> Advantages:
    """Keeps `keep` answers of each group, those with the largest variance of A; the others have 0.

    D3S. Such a subset is the i smallest and keep - i largest advantages, for the best i. They are
    not normalised again.

    Args:
      advantages: those that are chosen from.
      keep: answers of a group, at least 1; 0 keeps all.

    Raises:
      ValueError: a negative number.
    """
    check_number("keep", keep, least=0)

    def subset(rewards, groups, lengths):
        found = advantages(rewards, groups, lengths)
        live = ~np.isnan(np.asarray(rewards, np.float64))
        for group in np.unique(groups) if keep else ():
            (members,) = np.nonzero((np.asarray(groups) == group) & live)
            if len(members) <= keep:
                continue
            order = members[np.argsort(found[members], kind="stable")]
            choices = [
                np.concatenate([order[:low], order[len(order) - (keep - low) :]])
                for low in range(keep + 1)
            ]
            best = max(choices, key=lambda chosen: np.var(found[chosen].astype(np.float64)))
            found[np.setdiff1d(members, best)] = 0.0
        return found

    return subset


def _by_group(of_group: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Advantages:
    """A function of the rewards and lengths of one group, of those that did not fail.

    Equal rewards give 0.
    """

    def advantages(rewards, groups, lengths):
        rewards, groups = np.asarray(rewards, np.float64), np.asarray(groups)
        live = ~np.isnan(rewards)
        found = np.zeros(len(rewards), np.float32)
        for group in np.unique(groups[live]):
            members = live & (groups == group)
            own = rewards[members]
            # Rounding of the mean must not become a signal.
            if own.min() < own.max():
                found[members] = of_group(own, np.asarray(lengths)[members])
        return found

    return advantages
