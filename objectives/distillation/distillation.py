"""Distillation of a frozen teacher with the same vocabulary."""

from objectives.distillation.divergences import FORWARD, REVERSE, jensen_shannon
from objectives.distillation.taught import Comparison, taught_statistics
from objectives.losses.base import Loss
from objectives.weighting.base import check_name, check_number

DIVERGENCES = ("forward", "reverse", "jensen_shannon")


def distillation(
    divergence: str = "forward",
    mixing: float = 0.5,
    temperature: float = 1.0,
    share: float = 1.0,
) -> Loss:
    """l = share temperature^2 D(p, q) + (1 - share) (-log p_y), q being that of a frozen teacher.

    D is, over the whole vocabulary, at softmax(logits / temperature) of both:

      forward         KL(q || p) = sum_v q_v (log q_v - log p_v), which covers what the teacher does
      reverse         KL(p || q), which keeps to what the teacher finds likely
      jensen_shannon  b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, b = `mixing`

    Distillation with a temperature is that of Hinton et al. (arXiv 1503.02531, section 2), where
    its square keeps the size of the gradients; the three divergences are those of GKD (arXiv
    2306.13649), on whatever text the batch has: that of the data, or the student's own.

    The teacher may have another width and another head. In quantization-aware training it is the
    model before quantization: the student is to be the same function on its grids, whatever text
    there is (LLM-QAT, arXiv 2305.17888, in the form of whole distributions).

    Forward and reverse take one pass over the vocabulary, jensen_shannon two.

    Args:
      divergence: forward | reverse | jensen_shannon.
      mixing: jensen_shannon only: b, the teacher's share of the mixture, in (0, 1).
      temperature: that the logits of both are divided by for the divergence, above 0.
      share: of the divergence; 1 is the divergence alone, 0 is cross-entropy.

    Raises:
      ValueError: an unknown divergence, a number out of its bounds.
    """
    check_name("divergence", divergence, DIVERGENCES)
    check_number("mixing", mixing, above=0)
    if mixing >= 1:
        raise ValueError(f"mixing={mixing} must be below 1")
    check_number("temperature", temperature, above=0)
    check_number("share", share, least=0, most=1)
    chosen = {"forward": FORWARD, "reverse": REVERSE}.get(divergence) or jensen_shannon(mixing)
    comparison = Comparison(chosen, temperature)
    factor = share * temperature**2

    def statistics(inputs):
        found, loss_BT, *_ = taught_statistics(inputs, comparison)
        if factor != 1:
            loss_BT = factor * loss_BT
        if share != 1:
            loss_BT = loss_BT + (1 - share) * found.nll
        return found._replace(other_loss=loss_BT)

    return Loss(statistics=statistics, teachers=("teacher",))
