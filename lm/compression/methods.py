"""Quantization after training by name: one function for every method of launch.quantize."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lm.compression.after_training import PostTrained, gptq_model, round_to_nearest_model
from lm.compression.awq import awq_model
from lm.compression.outlier_suppression import outlier_suppression_model
from lm.compression.rotation import rotate_model
from lm.model.interface import Model
from lm.model.transformer import make_model
from lm.parallel.mesh import RULES
from objectives.quantization.gptq import RSQ_SMALLEST, RSQ_SMALLEST_ROTATED, rsq_importance
from objectives.quantization.qat import Rules

Batches = Sequence[dict[str, jax.Array]]


class Options(NamedTuple):
    """What methods can be told.

    Attributes:
      rotate: whether the residual stream is rotated first, see `rotation.rotate_model`.
      seed: of the rotation.
      activation: of `objectives.quantization.activation_quantizer`, the quantizer of inputs; None
        for inputs as they are.
      damping: this and the rest of GPTQ, and of what is built on it; see
        `after_training.gptq_model`. With act order and static groups is how GPTQ is mostly used
        today; the official code has neither as a default.
    """

    rotate: bool = False
    seed: int = 0
    activation: Callable[[jax.Array], jax.Array] | None = None
    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = False


class Quantization(NamedTuple):
    """What a method has made of a model.

    Attributes:
      changes: keys of the config's `model` section -> values that are new.
      params: the parameters before they were rounded: those of the model, or others of the same
        function (AWQ's clip aside).
      result: on grids.
    """

    changes: dict[str, Any]
    params: Any
    result: PostTrained


def _round_to_nearest(model, params, batches, rules, options):
    del model, batches, options
    return {}, params, round_to_nearest_model(params, rules)


# Options that are not those of GPTQ.
_OTHERS = ("rotate", "seed", "activation")


def _gptq(model, params, batches, rules, options, importance=None):
    of_gptq = {k: v for k, v in options._asdict().items() if k not in _OTHERS}
    return {}, params, gptq_model(model, params, batches, rules, importance, **of_gptq)


def _rsq(model, params, batches, rules, options):
    smallest = RSQ_SMALLEST_ROTATED if options.rotate else RSQ_SMALLEST
    importance = functools.partial(rsq_importance, smallest=smallest)
    return _gptq(model, params, batches, rules, options, importance)


def _awq(model, params, batches, rules, options):
    del options
    params = awq_model(model, params, batches, rules)
    return {}, params, round_to_nearest_model(params, rules)


def _outlier_suppression(model, params, batches, rules, options):
    found = outlier_suppression_model(model, params, batches, rules, options.activation)
    changes, params = found
    return changes, params, round_to_nearest_model(params, rules)


# Name -> (model, parameters, batches, rules, options) -> what `Quantization` has.
METHODS: dict[str, Callable[..., tuple[dict[str, Any], Any, PostTrained]]] = {
    "rtn": _round_to_nearest,
    "gptq": _gptq,
    "rsq": _rsq,
    "awq": _awq,
    "outlier_suppression": _outlier_suppression,
}

# Those that read no calibration text, and those that begin with scales by search.
WITHOUT_DATA = ("rtn",)
SEARCHING = ("gptq", "rsq")


def with_changes(model: Model, changes: dict[str, Any]) -> Model:
    """The model with keys of its config changed."""
    return make_model(dataclasses.replace(model.config, **changes), RULES) if changes else model


def quantize_after_training(
    method: str,
    model: Model,
    params: Any,
    batches: Batches,
    rules: Rules,
    options: Options | None = None,
) -> Quantization:
    """The parameters on the grids of `rules`, by a method of `METHODS`.

      rtn   every weight to the nearest level
      gptq  arXiv 2210.17323, see `after_training.gptq_model`
      rsq   GPTQ whose Hessians weigh a token by the attention that it receives (arXiv 2503.01820);
            with `rotate` as in the paper
      awq   scales and clips by search, then rtn (arXiv 2306.00978), see `awq.search_awq`
      outlier_suppression   shifts and scales of quantized inputs, then rtn (arXiv 2304.09145)

    Args:
      method: a name of `METHODS`.
      model: of `params`.
      params: the trained parameters.
      batches: calibration data; not read by methods of `WITHOUT_DATA`.
      rules: which leaf is quantized, and how.
      options: see there; their defaults without.

    Raises:
      InputError: a model that the method cannot change, a Hessian without a Cholesky factor, or
        weights that are not finite.
      ValueError: a shape that does not fit its quantizer, or a quantizer that the method lacks.
    """
    changes, options = {}, options or Options()
    if options.rotate:
        changes, params = rotate_model(model, params, options.seed)
        model = with_changes(model, changes)
    more, params, result = METHODS[method](model, params, batches, rules, options)
    return Quantization(changes | more, params, result)
