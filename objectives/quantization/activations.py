"""Quantization of activations while they are computed: one scale a token, read from the token.

T  tokens        D  channels (last axis), over which a token's scale is taken
"""

from collections.abc import Callable

import jax

from objectives.quantization.block_float import fp8_e4m3, fp8_e5m2
from objectives.quantization.data_scale import absmax

_FLOATS = {"fp8_e4m3": fp8_e4m3, "fp8_e5m2": fp8_e5m2}


def activation_quantizer(kind: str | float) -> Callable[[jax.Array], jax.Array] | None:
    """(x [..., T, D]) -> x on the grid of its token, for the inputs of matrix products.

      4 to 8 bits      x_q = s rint(x / s),   s = max |x| / (2^(bits-1) - 1)   (`absmax`)
      fp8_e4m3         x_q = s E4M3(x / s),   s = max |x| / 448                (`fp8_e4m3`)
      fp8_e5m2         x_q = s E5M2(x / s),   s = max |x| / 57344              (`fp8_e5m2`)

    with the maximum over the last axis, in float32; the result has the dtype of x. This is dynamic
    quantization: nothing is calibrated or learned. The gradient passes unchanged and none flows
    through the scale; no clip ever cuts it off, because the scale is the token's own maximum.
    Integers are symmetric, so their lowest level is never used. A token with an infinity or a NaN
    becomes NaN throughout: nothing that is not finite turns into a number here.

    Args:
      kind: 4 to 8, 16 or above, "fp8_e4m3" or "fp8_e5m2".

    Returns:
      The function, or None from 16 bits on: activations stay as they are.

    Raises:
      ValueError: another kind.
    """
    if kind in _FLOATS:
        quantizer = _FLOATS[kind](contraction_axis=-1)
    elif isinstance(kind, str) or (kind < 16 and kind not in (4, 5, 6, 7, 8)):
        raise ValueError(
            f"activations have 4, 5, 6, 7, 8, or 16 and more bits, or {' or '.join(_FLOATS)}; "
            f"got {kind!r}"
        )
    elif kind >= 16:
        return None
    else:
        quantizer = absmax(bits=kind, contraction_axis=-1)
    return lambda x: quantizer.quantize(x, ())
