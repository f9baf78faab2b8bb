"""Losses with a teacher of the same vocabulary; a config names one in `objective.loss`."""

from objectives.distillation.distillation import distillation

DISTILLATION = {"distillation": distillation}

__all__ = ["DISTILLATION", *DISTILLATION]
