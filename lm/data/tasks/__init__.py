"""Made tasks: problems that are drawn, not downloaded; `data.corpus=task:NAME` is one of `TASKS`.

A task is a factory of a function from random numbers to a problem; `lm.data.tasks.corpus` makes
documents of it.
"""

from lm.data.tasks.chains import chains
from lm.data.tasks.copying import copying
from lm.data.tasks.countdown import countdown
from lm.data.tasks.sorting import sorting
from lm.data.tasks.sums import sums

TASKS = {
    "sums": sums,
    "chains": chains,
    "sorting": sorting,
    "copying": copying,
    "countdown": countdown,
}

__all__ = ["TASKS"]
