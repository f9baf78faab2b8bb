"""Intervals over seeds, as the tables of this folder print them."""

import math
from collections.abc import Sequence

from scipy import stats

from lm.studies.comparison import summarise


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95% interval (Student's t); the mean alone for one seed."""
    found = summarise(values)
    if found.seeds < 2:
        return f"{found.mean:.4f}"
    half = stats.t.ppf(0.975, found.seeds - 1) * found.standard_error
    return f"{found.mean:.4f} ± {0.0 if math.isnan(half) else half:.4f}"
