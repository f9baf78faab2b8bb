"""Everything that gradients are taken in."""

from typing import Any, NamedTuple


class Trained(NamedTuple):
    """What gradients are taken in: what an optimizer step changes, and a moving average averages.

    Attributes:
      params: parameters of the model.
      scales: learned scales of the quantizers, a tree like `params` with () where there is none.
      loss: parameters of the loss, () for those without.
    """

    params: Any
    scales: Any = ()
    loss: Any = ()
