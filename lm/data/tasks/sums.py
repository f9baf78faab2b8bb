"""Sums of two numbers: 12+7= is 19."""

from lm.data.tasks.task import Draw, Made, Task, check_between


def sums(digits: int = 2) -> Task:
    """Two numbers, each from 0 to 10^digits - 1, all equally likely: 10^(2 digits) prompts.

    Args:
      digits: of a number at most, from 1 to 15.
    """
    check_between("digits", digits, 1, 15)

    def make(draw: Draw) -> Made:
        first, second = draw.below(10**digits), draw.below(10**digits)
        return Made(f"{first}+{second}=", str(first + second))

    return make
