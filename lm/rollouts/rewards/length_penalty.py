"""Rewards of the length of a text, in characters."""

from lm.rollouts.rewards.reward import Reward

_SHAPES = ("linear", "triangle")


def length_penalty(budget: int = 0, shape: str = "linear", margin: int = 0) -> Reward:
    """A function of the number of characters l of a text.

      linear:    0 for l <= b, (b - l) / m for b < l <= b + m, -1 beyond, with b = `budget` and
                 m = `margin`: the soft overlong punishment of DAPO (arXiv 2503.14476), whose L_max
                 is b + m and whose L_cache is m.
      triangle:  l / b for l <= b, 2 - l / b for b < l <= 2 b, 0 beyond: the length reward of
                 Reinforcement Mid-Training (arXiv 2509.24375). Its height r_max, which is
                 unconfirmed, is the weight in `rollouts.reward_weights`; its budget, which shrinks
                 during training, is constant here.

    Both papers count tokens. A reward sees text, so this counts characters.

    Args:
      budget: characters, see the formulas; it must be given.
      shape: linear | triangle.
      margin: linear only: characters from no penalty to the whole of it; it must be given.

    Raises:
      ValueError: an argument is missing or impossible.
    """
    if shape not in _SHAPES:
        raise ValueError(f"shape={shape!r} must be one of: {', '.join(_SHAPES)}")
    if budget < 1:
        raise ValueError(f"budget={budget} must be at least 1: characters that a text may have")
    if shape == "linear" and margin < 1:
        raise ValueError(f"margin={margin} must be at least 1 with shape='linear'")
    if shape == "triangle" and margin:
        raise ValueError(f"margin={margin} must be 0 with shape='triangle', which has none")

    def linear(text, record):
        del record
        return -min(max(len(text) - budget, 0) / margin, 1.0)

    def triangle(text, record):
        del record
        return max(min(len(text) / budget, 2 - len(text) / budget), 0.0)

    return linear if shape == "linear" else triangle
