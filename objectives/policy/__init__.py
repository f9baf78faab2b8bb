"""Policy gradients of answers that the model draws; a config names one in `objective.name`."""

from objectives.policy.cispo import cispo, minpro
from objectives.policy.ctpo import ctpo
from objectives.policy.d3s import d3s
from objectives.policy.grpo import balanced, dapo, dr_grpo, grpo
from objectives.policy.gspo import gspo, sspo
from objectives.policy.hapo import hapo
from objectives.policy.icepop import icepop
from objectives.policy.policy import policy
from objectives.policy.ppo import ppo
from objectives.policy.reinforce import reinforce, rloo
from objectives.policy.sapo import sapo
from objectives.policy.tw_grpo import tw_grpo

POLICY = {
    "policy": policy,
    "reinforce": reinforce,
    "rloo": rloo,
    "ppo": ppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "balanced": balanced,
    "gspo": gspo,
    "sspo": sspo,
    "cispo": cispo,
    "minpro": minpro,
    "sapo": sapo,
    "ctpo": ctpo,
    "icepop": icepop,
    "tw_grpo": tw_grpo,
    "d3s": d3s,
    "hapo": hapo,
}

__all__ = ["POLICY", *POLICY]
