"""Distillation of a model into itself with fewer bits, or into another of the same vocabulary."""

from objectives.losses.base import Loss
from objectives.losses.taught import taught_statistics
from objectives.weighting.base import check_number


def self_distillation(share: float = 1.0) -> Loss:
    """l = share KL(q || p) + (1 - share) (-log p_y), q the distribution of a frozen teacher.

    In quantization-aware training the teacher is the model before quantization: the student is to
    be the same function on its grids, whatever text there is (LLM-QAT, arXiv 2305.17888, in the
    form of whole distributions). KL(q || p) = sum_v q_v (log q_v - log p_v) over the whole
    vocabulary, at temperature 1, with teacher and student in one pass over blocks of it.

    Args:
      share: of the divergence; 1 is the divergence alone, 0 is cross-entropy.

    Raises:
      ValueError: a share outside of [0, 1].
    """
    check_number("share", share, least=0, most=1)

    def statistics(inputs):
        found, divergence_BT = taught_statistics(inputs)
        if share == 1:
            return found._replace(other_loss=divergence_BT)
        return found._replace(other_loss=share * divergence_BT + (1 - share) * found.nll)

    return Loss(statistics=statistics, teacher="teacher")
