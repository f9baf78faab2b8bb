"""The reward of a form that a text must have."""

import re

from lm.rollouts.rewards.reward import Reward

_MOST = 1000


def matches_format(pattern: str = "", search: bool = False) -> Reward:
    """1 where the text matches a regular expression of Python's `re`, 0 elsewhere.

    Which text takes long to match depends on the pattern ("(a+)+b" is a bad one): a text that takes
    longer than `rollouts.reward_seconds` loses its reward.

    Args:
      pattern: the expression, at most 1000 characters; "." matches line breaks after "(?s)". It
        must be given.
      search: the text need only contain a match; otherwise all of it must match.

    Raises:
      ValueError: the pattern is empty, too long, or no regular expression.
    """
    if not 0 < len(pattern) <= _MOST:
        raise ValueError(
            f"pattern={pattern[:50]!r} must be a regular expression of 1 to {_MOST} characters"
        )
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"pattern={pattern[:50]!r} must be a regular expression: {error}"
        ) from None
    match = compiled.search if search else compiled.fullmatch

    def reward(text, record):
        del record
        return float(match(text) is not None)

    return reward
