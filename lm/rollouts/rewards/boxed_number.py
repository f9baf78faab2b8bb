r"""The reward of the right number in \boxed{...}, as mathematical answers are written."""

import re
from fractions import Fraction

from lm.rollouts.rewards.reward import Reward

_BRACES = re.compile(r"\\boxed\{|\{|\}")

# 12, -3.50, 1,234, .5, 3/4, 2e-3, \frac{1}{2}. Of more digits it is no answer, and would take long.
_DIGITS = r"[0-9]{1,100}(?![0-9])"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)}])[-+−])?(?<![0-9])(?:"
    rf"\\[dt]?frac\{{(?P<over>{_DIGITS})\}}\{{(?P<under>{_DIGITS})\}}"
    rf"|(?:(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,30}}(?![0-9])|{_DIGITS})"
    rf"(?P<part>\.{_DIGITS})?|(?P<small>\.{_DIGITS}))"
    rf"(?P<exponent>[eE][-+]?[0-9]{{1,2}}(?![0-9]))?(?:/(?P<divisor>{_DIGITS}))?)"
)


def boxed_number(last_number: bool = False) -> Reward:
    r"""1 where the last number in the last \boxed{...} is that of the record's `answer`, else 0.

    Numbers are compared as such: 0.5, .50, 1/2 and \frac{1}{2} are equal, as are 1234 and 1,234.
    The number of the record is the last one in its `answer`, in a box where that has one.

    Args:
      last_number: a text without a box is judged by the last number in it.

    Raises:
      ValueError: (when called) there is no number in the record's answer.
    """

    def reward(text, record):
        box = _boxed(record["answer"])
        right = _last(record["answer"] if box is None else box)
        if right is None:
            raise ValueError(f"no number in the answer {record['answer'][:50]!r}")
        box = _boxed(text)
        if box is None:
            box = text if last_number else ""
        return float(_last(box) == right)

    return reward


def _boxed(text: str) -> str | None:
    """What the last box that is closed holds; None without one."""
    found, open_braces = None, []
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            open_braces.append((match.end(), match[0] != "{"))
        elif open_braces:
            start, box = open_braces.pop()
            if box and (found is None or start > found[0]):
                found = (start, match.start())
    return None if found is None else text[found[0] : found[1]]


def _last(text: str) -> Fraction | None:
    """The last number in a text; None where it has none."""
    found = None
    for match in _NUMBER.finditer(text):
        over, under = match["over"], match["under"] or match["divisor"] or "1"
        if over is None:
            written = (match["whole"] or "") + (match["part"] or match["small"] or "")
            over = written.replace(",", "") + (match["exponent"] or "")
        if int(under):
            value = Fraction(over) / int(under)
            found = -value if match["sign"] in ("-", "−") else value
    return found
