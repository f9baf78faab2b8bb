"""Losses with a teacher, a model or what one has stored; a config names one in `objective.loss`."""

from objectives.distillation.align_distil import align_distil
from objectives.distillation.dac_kl import dac_kl
from objectives.distillation.dhkd import dhkd
from objectives.distillation.distillation import distillation
from objectives.distillation.nd import nd
from objectives.distillation.nkd import nkd
from objectives.distillation.pld import pld
from objectives.distillation.top_k import top_k_distillation
from objectives.distillation.uld import uld

DISTILLATION = {
    "distillation": distillation,
    "nkd": nkd,
    "pld": pld,
    "dhkd": dhkd,
    "nd": nd,
    "dac_kl": dac_kl,
    "align_distil": align_distil,
    "top_k_distillation": top_k_distillation,
    "uld": uld,
}

__all__ = ["DISTILLATION", *DISTILLATION]
