"""Losses of pairs of answers; a config names one of `PREFERENCE` in `objective.name`."""

from objectives.preference.dpo import dpo
from objectives.preference.ipo import ipo

PREFERENCE = {
    "dpo": dpo,
    "ipo": ipo,
}

__all__ = ["PREFERENCE", *PREFERENCE]
