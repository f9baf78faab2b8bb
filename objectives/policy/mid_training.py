"""Budgets of thought, rewards of their length, and which tokens to think about.

Reinforcement mid-training (arXiv 2509.24375), from a summary and reviews: the model writes a
thought before it predicts a token, and a policy gradient learns from whether the prediction is
right. UNCONFIRMED and hence without a default: the share and the size of the reward of length, and
the probabilities of the tiers.
"""

import math

import numpy as np


def budget(progress: float, first: int = 800, decay: float = 0.2, least: int = 1) -> int:
    """max(least, floor(first * decay^progress)): how many tokens a thought should have.

    Args:
      progress: share of the training that is done, in [0, 1].
      first: tokens at the beginning.
      decay: factor over the whole training.
      least: lowest budget.
    """
    return max(least, math.floor(first * decay**progress))


def length_reward(length: float, tokens: int, largest: float) -> float:
    """A triangle: 0 at no tokens, `largest` at `tokens`, and 0 from twice as many on.

    Args:
      length: tokens of a thought.
      tokens: of `budget`, above 0.
      largest: reward at the budget.
    """
    return largest * max(0.0, 1 - abs(length / tokens - 1))


def mixed_reward(match: float, of_length: float, share: float) -> float:
    """(1 - share) * match + share * of_length."""
    return (1 - share) * match + share * of_length


def tiers(entropy: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """0 for easy tokens, 1 for medium and 2 for hard ones, by entropy; int64.

    Args:
      entropy: of the model's prediction, nats.
      bounds: the entropies where medium and hard tokens begin.
    """
    return np.digitize(entropy, bounds)


def tier_probabilities(
    progress: float, values: np.ndarray, knees: tuple[float, float] = (0.3, 0.7)
) -> np.ndarray:
    """Probability of each tier, linear in the progress between 0, two knees and 1; float64 [3].

    Args:
      progress: share of the training that is done, in [0, 1].
      values: [4, 3], probabilities of the tiers at 0, at the knees and at 1; rows sum to 1.
      knees: progress at the second and at the third row.
    """
    places = (0.0, *knees, 1.0)
    return np.array([np.interp(progress, places, column) for column in np.transpose(values)])
