"""What a token weighting is: two pure functions and the state between them."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Weighting(NamedTuple):
    """How much each token counts in the loss sum(w * nll) / sum(w).

    Attributes:
      init: () -> state, a pytree that is carried in the train state and in the checkpoint.
      weigh: (statistics, batch, references, state, step) -> (weights, state, metrics). Weights are
        float32 [B, T], carry no gradient, and are zero wherever the weight of the data is zero.
        `statistics` is None for a weighting that reads only the data, `references` for one that
        compares with no other model. Metrics are scalars by name.
    """

    init: Callable[[], Any]
    weigh: Callable[..., tuple[Any, Any, dict[str, Any]]]
