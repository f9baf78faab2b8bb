"""Widths that change during training: SNIP's loop (arXiv 2602.01410).

L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lm.compression.cache import of_parameters
from lm.compression.plan_widths import choose, layer_bytes, other_bytes
from lm.compression.sensitivity import Batch, Subject, leaves
from lm.compression.snip import snip
from lm.compression.widths import FULL_PRECISION, KNOWN, OfWidth, Widths
from lm.errors import InputError
from lm.model.interface import Model
from lm.model.parameters import LAYERS, layer_matrices
from lm.model.trained import Trained
from objectives.quantization import Mixed, settle
from objectives.quantization.qat import Rules


class Adaptation(NamedTuple):
    """How widths are planned anew during training.

    Attributes:
      rules: of all parameters; the layers' matrices have `Mixed` quantizers.
      quantizer_of: (path, bits) -> quantizer.
      choices: widths to choose from.
      paths: the matrices.
      budget: bytes, as in `plan_widths`.
      weighting: of `snip`.
    """

    rules: Rules
    quantizer_of: OfWidth
    choices: tuple[float, ...]
    paths: tuple[str, ...]
    budget: float
    weighting: float

    def plan(
        self,
        model: Model,
        trained: Trained,
        on_grid: Any,
        batches: Sequence[Batch],
        optimizer: Any,
        **adamw: Any,
    ) -> Widths:
        """The widths of least dL + weighting * dW within the budget.

        Rounding errors are those of the trained weights, with the scales that quantizers start
        from; gradients those of the model as it is quantized now.

        Args:
          model: of the parameters.
          trained: parameters and scales.
          on_grid: the parameters on their grids.
          batches: of which the gradients are.
          optimizer: state of AdamW, of which the moments are; not used with a weighting of 0.
          **adamw: learning_rate, beta1 and beta2, see `snip`.
        """
        if self.weighting:
            first, second, step = moments(optimizer)
            adamw |= {"moments": (first, second), "step": step}
        sensitivity = snip(self.weighting, **adamw)
        subject = self.subject(model, trained.params, batches)._replace(point=on_grid)
        budget = self.budget - other_bytes(trained.params, self.paths, self.rules)
        return choose(subject, sensitivity(subject), layer_bytes(subject), budget)

    def subject(self, model: Model | None, params: Any, batches: Sequence[Batch] = ()) -> Subject:
        """What sensitivities are found of."""
        return Subject(model, params, batches, self.quantizer_of, self.choices, self.paths)

    def indices(self, widths: Widths) -> dict[str, np.ndarray]:
        """The numbers of the layers' quantizers, float32 [L], of a plan."""
        found = {}
        for path, bits in widths.items():
            members = self.rules(path).members
            numbers = [members.index(self.quantizer_of(path, width)) for width in bits]
            found[path] = np.array(numbers, np.float32)
        return found

    def widths(self, scales: Any) -> Widths:
        """The widths that layers have now, by their scales."""
        found = {}
        for path in self.paths:
            scale = scales
            for key in path.split("/"):
                scale = scale[key]
            quantizer, _ = settle(self.rules(path), scale)
            mixed = isinstance(quantizer, Mixed)
            found[path] = quantizer.widths if mixed else (quantizer.bits,) * len(scale.index)
        return found


def make_adaptation(
    c: ConfigDict, shapes: Any, rules: Rules, quantizer_of: OfWidth
) -> Adaptation | None:
    """Of the `quantization` section; None where widths do not change.

    Raises:
      InputError: widths that there are not, or a budget that is too small for any plan.
    """
    if not c.adapt_every:
        return None
    choices = check_choices(c)
    paths = tuple(path for path in matrices(shapes) if isinstance(rules(path), Mixed))
    adaptation = Adaptation(rules, quantizer_of, choices, paths, c.adapt_bytes, c.adapt_weighting)
    sizes = layer_bytes(adaptation.subject(None, shapes))
    least = other_bytes(shapes, paths, rules) + sizes.min(axis=1).sum()
    if c.adapt_bytes < least:
        raise InputError(
            f"quantization.adapt_bytes={c.adapt_bytes:,.0f} is too small for "
            f"quantization.adapt_widths from {min(choices):g} bits; the least is {least:,.0f} bytes"
        )
    return adaptation


def check_choices(c: ConfigDict) -> tuple[float, ...]:
    """The widths of quantization.adapt_widths.

    Raises:
      InputError: none, or one that there is not.
    """
    choices = tuple(c.adapt_widths)
    valid = [bits for bits in KNOWN if bits < FULL_PRECISION]
    if not choices or not set(choices) <= set(valid):
        raise InputError(
            f"quantization.adapt_widths={choices} must be some of: "
            + ", ".join(f"{bits:g}" for bits in valid)
        )
    return choices


def matrices(shapes: Any) -> tuple[str, ...]:
    """Paths of the layers' matrices."""
    return tuple(f"{LAYERS}/{name}" for name in layer_matrices(shapes[LAYERS]))


def change_scales(rules: Rules, params: Any, scales: Any, indices: Mapping[str, Any]) -> Any:
    """The tree of scales with layers on other quantizers; those that change get first scales.

    Args:
      rules: with `Mixed` quantizers for the paths of `indices`.
      params: the parameters.
      scales: of `init_scales`, or trained.
      indices: path -> numbers of the layers' quantizers, [L].
    """

    def at(keys, weights, scale):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return rules(path).move(weights, scale, indices[path]) if path in indices else scale

    changed = jax.tree_util.tree_map_with_path(at, params, of_parameters(scales))
    return {**scales, **changed}


def moments(optimizer: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """(first moments, second moments, number of the next update) of AdamW's state, by path.

    Raises:
      InputError: the state has none, as that of another optimizer.
    """
    found: tuple[dict, dict] = {}, {}
    for by_path, name in zip(found, ("mu", "nu"), strict=True):
        for _, tree in optax.tree.get_all_with_path(optimizer, name):
            by_path |= leaves(tree.params)
    if not all(found):
        raise InputError("quantization.adapt_every needs the moments of optimizer.name=adamw")
    counts = optax.tree.get_all_with_path(optimizer, "count", _of_adam)
    return *found, jnp.asarray(counts[0][1] + 1, jnp.float32)


def _of_adam(path: Any, value: Any) -> bool:
    del value
    return getattr(path[-1], "tuple_name", "") == "ScaleByAdamState"
