"""Token and sample weights; a config names one or several of `WEIGHTINGS` in its objective."""

from objectives.weighting.base import (
    NORMALISATIONS,
    Weighting,
    chain,
    normalise,
    weight_metrics,
)
from objectives.weighting.block_sensitive import block_sensitive
from objectives.weighting.critical_token import critical_token
from objectives.weighting.dft import dft
from objectives.weighting.dynamic import dynamic
from objectives.weighting.fait import fait
from objectives.weighting.focal import focal
from objectives.weighting.frequency_equity import frequency_equity
from objectives.weighting.glow import glow
from objectives.weighting.prior import prior
from objectives.weighting.q_tuning import q_tuning
from objectives.weighting.rho1 import rho1
from objectives.weighting.sat_imp import sat_imp, sim_imp, sim_sat, wga
from objectives.weighting.ss_token import ss_token
from objectives.weighting.uniform import uniform
from objectives.weighting.uskd import uskd

WEIGHTINGS = {
    "uniform": uniform,
    "rho1": rho1,
    "ss_token": ss_token,
    "prior": prior,
    "fait": fait,
    "sat_imp": sat_imp,
    "sim_sat": sim_sat,
    "sim_imp": sim_imp,
    "wga": wga,
    "dft": dft,
    "focal": focal,
    "block_sensitive": block_sensitive,
    "uskd": uskd,
    "frequency_equity": frequency_equity,
    "critical_token": critical_token,
    "dynamic": dynamic,
    "glow": glow,
    "q_tuning": q_tuning,
}

__all__ = [
    "NORMALISATIONS",
    "WEIGHTINGS",
    "Weighting",
    "chain",
    "normalise",
    "weight_metrics",
    *WEIGHTINGS,
]
