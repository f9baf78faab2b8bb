"""Weights of few bits to draw answers with, while those in full precision are trained."""

from ml_collections import ConfigDict

from lm.compression.phases import Quantized, make_quantized
from lm.compression.widths import FULL_PRECISION
from lm.errors import InputError
from lm.model.interface import Model
from lm.training.state import parameter_shapes


def make_rounding(config: ConfigDict, model: Model) -> Quantized | None:
    """What `rollouts.bits` asks for: the matrices of all layers, rounded to nearest.

    The quantizer is absmax in the layout of the `quantization` section; embedding, head and norms
    are as they are trained.

    Args:
      config: the run.
      model: its model.

    Returns:
      None where answers are drawn with the weights as they are.

    Raises:
      InputError: a width that absmax does not have, or a group that does not divide a matrix.
    """
    if config.rollouts.bits >= FULL_PRECISION:
        return None
    section = config.quantization.copy_and_resolve_references()
    section.update(quantizer="absmax", bits=config.rollouts.bits, outer_bits=float(FULL_PRECISION))
    section.update(widths="", adapt_every=0, begin_with="weights")
    try:
        return make_quantized(section, parameter_shapes(model), model)
    except InputError as error:
        raise InputError(f"rollouts.bits={config.rollouts.bits:g}: {error}") from None
