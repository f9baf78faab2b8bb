"""Fault-aware fine-tuning of code: the tokens that tell a correct answer from a faulty one."""

import difflib
from collections.abc import Sequence

import jax
import numpy as np

from objectives.weighting.base import (
    Weighting,
    check_number,
    multiply,
    reference,
    row_mean,
    stateless,
)


def fait(strength: float = 1.0) -> Weighting:
    """w = d * (1 + strength * e * sigmoid(s_faulty - s_correct)).

    e marks the targets of the correct answer that the faulty one lacks (`error_mask`), s is the
    mean log-probability of the differing tokens: of the correct answer under the model that is
    trained, of the faulty one as the reference says. The weight is large while the fault is as
    likely as the truth. Fault-aware instruction tuning (arXiv 2503.16913).

    UNCONFIRMED: the paper's weight inside of e is dynamic and computed from the likelihoods of both
    versions; its exact form was not available, and this one is ours. strength = 0 or an empty mask
    is cross-entropy.

    Needs the references "error_mask" (e, [B, T] of 0 and 1) and "faulty_log_probability"
    (s_faulty, [B, T], the same number along a row).

    Args:
      strength: extra weight of tokens that a faulty answer lacks, at least 0; 0 is off.

    Raises:
      ValueError: a negative `strength`.
    """
    check_number("strength", strength, least=0)

    def weigh(statistics, batch, references, state, step):
        mask_BT = reference(references, "error_mask")
        faulty_BT = reference(references, "faulty_log_probability")
        log_p_BT = jax.lax.stop_gradient(statistics.log_probability)
        correct_B1 = row_mean(log_p_BT, batch["weights"] * (mask_BT != 0))
        boost_BT = mask_BT * jax.nn.sigmoid(faulty_BT - correct_B1)
        return multiply(batch, 1 + strength * boost_BT), state, {}

    return Weighting(
        stateless,
        weigh,
        uses_statistics=True,
        references=("error_mask", "faulty_log_probability"),
    )


def error_mask(correct: Sequence[int], faulty: Sequence[int]) -> np.ndarray:
    """Which tokens of the correct answer are not in the faulty one, by `difflib`; booleans [T]."""
    mask = np.ones(len(correct), bool)
    for block in difflib.SequenceMatcher(
        None, correct, faulty, autojunk=False
    ).get_matching_blocks():
        mask[block.a : block.a + block.size] = False
    return mask
