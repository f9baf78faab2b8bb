"""What a forward pass can be asked for besides its hidden states.

B batch, T length, D width.
"""

from typing import Any, NamedTuple

import jax

from lm.model.config import ModelConfig
from lm.model.interface import LayerProducts, Tokens
from lm.model.layers import AttentionShare, Norm
from lm.model.places import make_places


class ForwardPass(NamedTuple):
    """A forward pass, as a tap reads it: `input_BTD` is that of the last layer."""

    config: ModelConfig
    products: LayerProducts
    variables: Any
    inputs: Tokens
    input_BTD: jax.Array | None
    hidden_BTD: jax.Array


def _attention_to(passed: ForwardPass, to_BT: jax.Array) -> jax.Array:
    """The share of the last layer's attention that goes to the positions marked in `to`.

    Mean over heads, float32 [B, T], without blocks, a constant to gradients. It is computed again
    beside the model: its own attention may be a kernel that never holds probabilities.
    """
    c, inputs = passed.config, passed.inputs
    layer = {k: jax.tree.map(lambda x: x[-1], v["layers"]) for k, v in passed.variables.items()}
    layer, input_BTD = jax.lax.stop_gradient((layer, passed.input_BTD))
    y_BTD = input_BTD
    if c.norm_placement != "after":
        y_BTD = Norm(c).apply({"params": layer["params"]["attention_norm"]}, y_BTD)
    own = {name: tree["attention"] for name, tree in layer.items() if "attention" in tree}
    place = make_places(c, inputs.positions).at(c.layers - 1)
    product, quantizer = passed.products.product, passed.products.cache
    # `product` finds the weights by this name.
    return AttentionShare(c, product, quantizer, name="attention").apply(
        own, y_BTD, place, inputs.segment_ids, to_BT
    )


def _hidden(passed: ForwardPass, _: Any) -> jax.Array:
    """The states in front of the head, [B, T, D]; the argument is ignored."""
    return passed.hidden_BTD


# Name of a tap -> (forward pass, argument of the tap) -> array.
TAPS = {"attention_to": _attention_to, "hidden": _hidden}
