"""Countdown: make 46 from 3 7 25= is 25+3*7, or any other expression of these numbers."""

from lm.data.tasks.task import Draw, Made, Task, check_between

# How tightly an operation binds: the least value that each of its sides must have to stand without
# brackets. A number binds most tightly.
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}
_NUMBER = 3


def countdown(numbers: int = 3, largest: int = 25, target: int = 100) -> Task:
    """Numbers, smallest first, and a target; asked is an expression that makes it of them.

    It may have +, -, *, / and brackets, and each number at most once. The stored answer uses every
    number once, and all values on its way are whole and not negative. A reward reads `numbers` and
    `target` in the record.

    Args:
      numbers: that are given, from 2 to 6.
      largest: of the numbers, which begin at 1; from 1 to 1000.
      target: largest target, which begin at 1; from 10 to 1000000.
    """
    check_between("numbers", numbers, 2, 6)
    check_between("largest", largest, 1, 1000)
    check_between("target", target, 10, 1_000_000)

    def make(draw: Draw) -> Made:
        while True:
            given = [draw.between(1, largest) for _ in range(numbers)]
            value, answer = _expression(draw, given)
            if 1 <= value <= target:
                # In order, or a problem could be held out and be trained on in another order.
                numbers_given = sorted(given)
                asked = " ".join(map(str, numbers_given))
                further = {"numbers": numbers_given, "target": value}
                return Made(f"make {value} from {asked}=", answer, further)

    return make


def _expression(draw: Draw, given: list[int]) -> tuple[int, str]:
    """The value and the text of a random expression that uses each number once."""
    parts = [(number, str(number), _NUMBER) for number in given]
    while len(parts) > 1:
        left, right = (parts.pop(draw.below(len(parts))) for _ in range(2))
        signs = "+*"
        if left[0] >= right[0]:
            signs += "-"
        if right[0] and left[0] % right[0] == 0:
            signs += "/"
        sign = signs[draw.below(len(signs))]
        parts.append((_value(sign, left[0], right[0]), _text(sign, left, right), _BINDS[sign]))
    return parts[0][0], parts[0][1]


def _value(sign: str, left: int, right: int) -> int:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    return left * right if sign == "*" else left // right


def _text(sign: str, left: tuple[int, str, int], right: tuple[int, str, int]) -> str:
    binds = _BINDS[sign]
    before = left[1] if left[2] >= binds else f"({left[1]})"
    # a-(b+c) and a/(b*c) need their brackets, a+(b-c) and a*(b/c) do not.
    alone = right[2] > binds or (right[2] == binds and sign in "+*")
    return f"{before}{sign}{right[1] if alone else f'({right[1]})'}"
