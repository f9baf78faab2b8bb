"""Losses with a teacher of the same vocabulary; a config names one in `objective.loss`."""

from objectives.distillation.align_distil import align_distil
from objectives.distillation.dac_kl import dac_kl
from objectives.distillation.dhkd import dhkd
from objectives.distillation.distillation import distillation
from objectives.distillation.nd import nd
from objectives.distillation.nkd import nkd
from objectives.distillation.pld import pld

DISTILLATION = {
    "distillation": distillation,
    "nkd": nkd,
    "pld": pld,
    "dhkd": dhkd,
    "nd": nd,
    "dac_kl": dac_kl,
    "align_distil": align_distil,
}

__all__ = ["DISTILLATION", *DISTILLATION]
