"""Losses of pairs of answers; a config names one of `PREFERENCE` in `objective.name`."""

from objectives.preference.bco import bco
from objectives.preference.cdpo import cdpo
from objectives.preference.ches import ches_dpo
from objectives.preference.cpo import cpo
from objectives.preference.dpo import dpo
from objectives.preference.ipo import ipo
from objectives.preference.kto import kto
from objectives.preference.npo import npo
from objectives.preference.orpo import orpo
from objectives.preference.sim_npo import sim_npo
from objectives.preference.simpo import simpo
from objectives.preference.sparse_po import sparse_po
from objectives.preference.tars import tars
from objectives.preference.tgdpo import tgdpo
from objectives.preference.treg import treg

PREFERENCE = {
    "dpo": dpo,
    "ipo": ipo,
    "kto": kto,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
    "tgdpo": tgdpo,
    "treg": treg,
    "cdpo": cdpo,
    "sparse_po": sparse_po,
    "tars": tars,
    "ches_dpo": ches_dpo,
    "bco": bco,
    "npo": npo,
    "sim_npo": sim_npo,
}

__all__ = ["PREFERENCE", *PREFERENCE]
