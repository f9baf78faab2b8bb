"""The reward of an expression that makes a number from given ones, as `task:countdown` asks."""

import re
from collections import Counter
from fractions import Fraction

from lm.rollouts.rewards.reward import Reward

_MOST = 1000
_DEEPEST = 50
_TOKEN = re.compile(r"\s*([0-9]{1,15}(?![0-9])|[-+*/()])")


def countdown(well_formed: float = 0.0) -> Reward:
    """1 where the text is an expression of the record's `numbers` that makes its `target`.

    The expression has whole numbers, each of those given used at most once, +, -, *, / and
    brackets. Values are fractions, without rounding.

    Args:
      well_formed: reward of such an expression with another value; any other text has 0.

    Raises:
      ValueError: well_formed is not from 0 to 1.
      KeyError: (when called) the record has no `numbers` or no `target`.
    """
    if not 0 <= well_formed <= 1:
        raise ValueError(f"well_formed={well_formed} must be from 0 to 1")

    def reward(text, record):
        given, target = Counter(record["numbers"]), record["target"]
        try:
            value, used = evaluate(text)
        except (ValueError, ZeroDivisionError):
            return 0.0
        if Counter(used) - given:
            return 0.0
        return 1.0 if value == target else well_formed

    return reward


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The value of an expression and the numbers in it.

    Raises:
      ValueError: it is no expression, longer than 1000 characters or nested too deeply.
      ZeroDivisionError: it divides by zero.
    """
    if len(text) > _MOST:
        raise ValueError("too long")
    parser = _Parser(_tokens(text))
    value = parser.sum(0)
    if parser.left:
        raise ValueError("more after the end of the expression")
    return value, parser.used


def _tokens(text: str) -> list[str]:
    tokens, at, text = [], 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise ValueError("neither a number nor an operation")
        tokens.append(match[1])
        at = match.end()
    return tokens


class _Parser:
    """Reads sum = product (("+" | "-") product)*, product = atom (("*" | "/") atom)*.

    An atom is a number, or a sum in brackets.

    Attributes:
      left: tokens that are not read yet, the next one last.
      used: numbers that were read.
    """

    def __init__(self, tokens: list[str]):
        self.left, self.used = tokens[::-1], []

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self.left and self.left[-1] in "+-":
            sign = self.left.pop()
            other = self._product(depth)
            value = value + other if sign == "+" else value - other
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._atom(depth)
        while self.left and self.left[-1] in "*/":
            sign = self.left.pop()
            other = self._atom(depth)
            value = value * other if sign == "*" else value / other
        return value

    def _atom(self, depth: int) -> Fraction:
        token = self.left.pop() if self.left else ""
        if token == "(" and depth < _DEEPEST:
            value = self.sum(depth + 1)
            if not self.left or self.left.pop() != ")":
                raise ValueError("a bracket is not closed")
            return value
        if not token.isdigit():
            raise ValueError("a number is missing")
        self.used.append(int(token))
        return Fraction(int(token))
