"""Quantization after training by name: one function for every method of launch.quantize."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lm.compression.after_training import PostTrained, gptq_model, round_to_nearest_model
from lm.model.interface import Model
from objectives.quantization.gptq import RSQ_SMALLEST, rsq_importance
from objectives.quantization.qat import Rules

Batches = Sequence[dict[str, jax.Array]]


class Options(NamedTuple):
    """Of GPTQ, and of what is built on it; see `after_training.gptq_model`.

    With act order and static groups is how GPTQ is mostly used today; the official code has neither
    as a default.
    """

    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = False
    between: Callable[[], None] = lambda: None


def _round_to_nearest(model, params, batches, rules, options) -> PostTrained:
    del model, batches, options
    return round_to_nearest_model(params, rules)


def _gptq(model, params, batches, rules, options, importance=None) -> PostTrained:
    return gptq_model(model, params, batches, rules, importance, **options._asdict())


def _rsq(model, params, batches, rules, options) -> PostTrained:
    importance = functools.partial(rsq_importance, smallest=RSQ_SMALLEST)
    return _gptq(model, params, batches, rules, options, importance)


# Name -> (model, parameters, batches, rules, options) -> `PostTrained`.
METHODS: dict[str, Callable[..., PostTrained]] = {
    "rtn": _round_to_nearest,
    "gptq": _gptq,
    "rsq": _rsq,
}

# Those that read no calibration text.
WITHOUT_DATA = ("rtn",)


def quantize_after_training(
    method: str,
    model: Model,
    params: Any,
    batches: Batches,
    rules: Rules,
    options: Options = Options(),  # noqa: B008 a tuple of numbers
) -> PostTrained:
    """The parameters on the grids of `rules`, by a method of `METHODS`.

      rtn   every weight to the nearest level
      gptq  arXiv 2210.17323, see `after_training.gptq_model`
      rsq   GPTQ whose Hessians weigh a token by the attention that it receives (arXiv 2503.01820)

    Args:
      method: a name of `METHODS`.
      model: of `params`.
      params: the trained parameters.
      batches: calibration data; not read by methods of `WITHOUT_DATA`.
      rules: which leaf is quantized, and how.
      options: of GPTQ.

    Raises:
      InputError: a Hessian has no Cholesky factor, or weights are not finite.
      ValueError: a shape that does not fit its quantizer, or a quantizer that the method lacks.
    """
    return METHODS[method](model, params, batches, rules, options)
