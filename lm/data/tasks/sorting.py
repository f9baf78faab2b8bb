"""Sorting: sort 5 3 9= is 3 5 9."""

from lm.data.tasks.task import Draw, Made, Task, check_between


def sorting(length: int = 5, largest: int = 99) -> Task:
    """Numbers in random order, to be written in ascending order; equal ones may occur.

    Args:
      length: numbers at most, from 2 to 100; there are as many, or fewer, equally likely.
      largest: of the numbers, which begin at 0; from 1 to 999999.
    """
    check_between("length", length, 2, 100)
    check_between("largest", largest, 1, 999_999)

    def make(draw: Draw) -> Made:
        numbers = [draw.between(0, largest) for _ in range(draw.between(2, length))]
        asked, right = (" ".join(map(str, one)) for one in (numbers, sorted(numbers)))
        return Made(f"sort {asked}=", right)

    return make
