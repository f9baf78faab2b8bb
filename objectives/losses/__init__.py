"""Losses of the tokens; a config names one of `LOSSES` in its objective."""

from objectives.distillation import DISTILLATION
from objectives.losses.base import (
    CROSS_ENTROPY,
    Inputs,
    Loss,
    Teacher,
    logits,
    prediction_statistics,
    training_statistics,
)
from objectives.losses.block_distillation import block_distillation
from objectives.losses.cross_entropy import cross_entropy
from objectives.losses.harmonic import harmonic
from objectives.losses.inverted_hinge import inverted_hinge
from objectives.losses.one_token_rollout import one_token_rollout
from objectives.losses.overlap import dice, tversky
from objectives.losses.self_distillation import self_distillation
from objectives.losses.tempnet import tempnet

LOSSES = {
    "cross_entropy": cross_entropy,
    "dice": dice,
    "tversky": tversky,
    "inverted_hinge": inverted_hinge,
    "one_token_rollout": one_token_rollout,
    "tempnet": tempnet,
    "harmonic": harmonic,
    "block_distillation": block_distillation,
    "self_distillation": self_distillation,
    **DISTILLATION,
}

__all__ = [
    "CROSS_ENTROPY",
    "LOSSES",
    "Inputs",
    "Loss",
    "Teacher",
    "logits",
    "prediction_statistics",
    "training_statistics",
    *LOSSES,
]
