"""Losses with a teacher that is another model; a config names one in `objective.loss`."""

from objectives.distillation.top_k import top_k_distillation
from objectives.distillation.uld import uld

DISTILLATION = {"top_k_distillation": top_k_distillation, "uld": uld}

__all__ = ["DISTILLATION", *DISTILLATION]
