"""Chains of arithmetic: 3+4*2-5= is 6."""

from lm.data.tasks.task import Draw, Made, Task, check_between


def chains(operations: int = 3, largest: int = 9) -> Task:
    """Additions, subtractions and multiplications of small numbers, products first as usual.

    Args:
      operations: of a chain at most, from 1 to 20; it has as many, or fewer, equally likely.
      largest: of the numbers, which begin at 0; from 1 to 999.
    """
    check_between("operations", operations, 1, 20)
    check_between("largest", largest, 1, 999)

    def make(draw: Draw) -> Made:
        number = draw.between(0, largest)
        prompt = str(number)
        done, product = 0, number  # The value is done + product, of which the product may go on.
        for _ in range(draw.between(1, operations)):
            sign, number = "+-*"[draw.below(3)], draw.between(0, largest)
            prompt += f"{sign}{number}"
            if sign == "*":
                product *= number
            else:
                done, product = done + product, number if sign == "+" else -number
        return Made(f"{prompt}=", str(done + product))

    return make
