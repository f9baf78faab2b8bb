"""Token and sample weights; a config names one of `WEIGHTINGS` in `objective.weighting`."""

from objectives.weighting.base import Weighting
from objectives.weighting.uniform import uniform

WEIGHTINGS = {"uniform": uniform}

__all__ = ["WEIGHTINGS", "Weighting", "uniform"]
