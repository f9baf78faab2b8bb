"""Quantization-aware training of a model: which weights, from which step, and how a pass changes.

B rows, T tokens, I and O the inputs and outputs of a matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from lm.compression.adaptation import Adaptation, check_choices, make_adaptation, matrices
from lm.compression.cache import (
    CACHES,
    KEYS,
    first_key_scales,
    make_cache_quantizer,
    of_parameters,
)
from lm.compression.widths import FULL_PRECISION, of_width, read_widths, with_widths
from lm.errors import InputError
from lm.model.config import check_choice
from lm.model.interface import CacheQuantizer, LayerProducts, Model
from lm.model.parameters import LAYERS, parameter_kind
from lm.model.products import project
from lm.model.trained import Trained
from lm.parallel.mesh import to_host
from objectives.quantization import (
    QUANTIZERS,
    activation_quantizer,
    default_quantizers,
    init_scales,
    optimal_qat_fraction,
    outside_clip_range,
    quantization_error,
    quantize_tree,
    searched,
)
from objectives.quantization.qat import Rules


class Quantized(NamedTuple):
    """What the forward pass of the quantized phase needs besides the model.

    Attributes:
      rules: path of a parameter -> quantizer or None.
      product: replaces the matrix products of the layers, see `lm.model.transformer.Model`.
      adaptation: how widths change during training; None where they do not.
      activation: puts inputs of the products on their grids; None leaves them.
      cache: the same of keys and values.
      first_key_scales: (params) -> the first scales of its keys; None without `cache`.
    """

    rules: Rules
    product: Callable[..., jax.Array]
    adaptation: Adaptation | None = None
    activation: Callable[[jax.Array], jax.Array] | None = None
    cache: CacheQuantizer | None = None
    first_key_scales: Callable[[Any], jax.Array] | None = None

    def first_scales(self, params: Any) -> Any:
        """Scales from the weights as they are: what the quantized phase starts with.

        A tree like the parameters, and beside it, under `KEYS`, the scales of a quantized cache.
        """
        scales = init_scales(params, self.rules)
        return {**scales, KEYS: self.first_key_scales(params)} if self.cache else scales

    def layers(self, trained: Trained) -> LayerProducts:
        """What the layers of a forward pass are given."""
        key_scales = trained.scales[KEYS] if self.cache else ()
        return LayerProducts(self.product, trained.scales[LAYERS], self.cache, key_scales)

    def of_stored(self) -> "Quantized | None":
        """What is left to do with parameters that are on their grids already; None if nothing is.

        That is the rounding of activations and of the cache, which are made anew for every token.
        """
        if self.activation is None and self.cache is None:
            return None
        return self._replace(rules=_leave, product=make_product(_leave, self.activation))

    def outer(self, trained: Trained) -> Any:
        """Parameters with all on the grid that is not in a layer; the layers as they are."""
        on_grid = {
            name: quantize_tree(part, trained.scales[name], self.rules, prefix=f"{name}/")
            for name, part in trained.params.items()
            if name != LAYERS
        }
        return {**on_grid, LAYERS: trained.params[LAYERS]}

    def report(self, trained: Trained) -> dict[str, dict[str, list[float] | float]]:
        """Of every quantized matrix: its relative squared error and its share of clipped weights.

        By path; a list over layers for stacked matrices. See `objectives.quantization`.
        """
        return jax.tree.map(lambda x: to_host(x).tolist(), _errors(self.rules, trained))

    def on_grid(self, trained: Trained) -> Any:
        """All parameters on their grids: a second copy of the model."""
        return quantize_tree(trained.params, of_parameters(trained.scales), self.rules)


def _leave(path: str) -> None:
    """The rules under which no parameter is quantized."""


# Compiled once a run, however often they are called.


@functools.partial(jax.jit, static_argnums=0)
def first_scales(quantized: Quantized, params: Any) -> Any:
    """`Quantized.first_scales`, compiled."""
    return quantized.first_scales(params)


@functools.partial(jax.jit, static_argnums=0)
def on_grid(quantized: Quantized, trained: Trained) -> Any:
    """`Quantized.on_grid`, compiled."""
    return quantized.on_grid(trained)


@functools.partial(jax.jit, static_argnums=0)
def _errors(rules: Rules, trained: Trained) -> dict[str, dict[str, jax.Array]]:
    params, scales = trained.params, of_parameters(trained.scales)
    return {
        "quantization_error": quantization_error(params, scales, rules),
        "outside_clip_range": outside_clip_range(params, scales, rules),
    }


def default_rules(bits: float, *quantizer: Callable[..., Any], **layout: Any) -> Rules:
    """The rules of a model of this repository; the arguments of `default_quantizers`.

    Raises:
      ValueError: a width or a layout that the quantizer does not have. From the rules: a parameter
        of no known kind.
    """
    by_kind = default_quantizers(bits, *quantizer, **layout)
    return lambda path: by_kind[parameter_kind(path)]


def with_search(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory of a quantizer that searches its first scales, see `scale_search.searched`."""

    def make(**options):
        quantizer = factory(**options)
        return quantizer and searched(quantizer)

    return make


# `quantization.activations` -> kind of `activation_quantizer`.
ACTIVATIONS = {
    "none": FULL_PRECISION,
    **{f"int{bits}": bits for bits in range(4, 9)},
    **{kind: kind for kind in ("fp8_e4m3", "fp8_e5m2")},
}


def make_quantized(c: ConfigDict, shapes: Any, model: Model | None = None) -> Quantized | None:
    """The `quantization` section for parameters of these shapes; None where it changes nothing.

    Args:
      c: the section.
      shapes: of the parameters.
      model: theirs; without it the cache is left out, for those who ask about weights.

    Raises:
      InputError: a width that the quantizer lacks, a group that does not divide a matrix, a plan of
        widths that is not one of this model, a cache that the model cannot have.
    """
    check_choice("quantization.quantizer", c.quantizer, tuple(QUANTIZERS))
    check_choice("quantization.activations", c.activations, tuple(ACTIVATIONS))
    check_choice("quantization.begin_with", c.begin_with, ("weights", "search", "gptq", "rsq"))
    check_choice("quantization.cache", c.cache, tuple(CACHES))
    if not is_on(c):
        return None
    calibrated = c.begin_with in ("gptq", "rsq")
    if calibrated and (not has_grids(c) or not c.gptq_batches):
        raise InputError(
            f"quantization.begin_with={c.begin_with!r} needs quantization.bits below 16 and "
            "quantization.gptq_batches above 0"
        )
    if c.begin_unrounded and not calibrated:
        raise InputError(
            "quantization.begin_unrounded=True needs quantization.begin_with='gptq' or 'rsq'; "
            f"got {c.begin_with!r}"
        )
    activation = activation_quantizer(ACTIVATIONS[c.activations])
    widths = read_widths(c.widths, shapes) if c.widths else {}
    choices = check_choices(c) if c.adapt_every else ()
    if choices:
        layers = len(jax.tree.leaves(shapes[LAYERS])[0])
        widths = {path: (c.bits,) * layers for path in matrices(shapes)} | widths
    try:
        layout = {"granularity": c.granularity, "group_size": c.group_size}
        layout = {option: value for option, value in layout.items() if value}
        factory = QUANTIZERS[c.quantizer]
        if c.begin_with != "weights":
            factory = with_search(factory)
        rules = default_rules(c.bits, factory, outer_bits=c.outer_bits, **layout)
        quantizer_of = of_width(factory, **layout)
        if widths:
            rules = with_widths(rules, widths, quantizer_of, choices)
        jax.eval_shape(lambda params: init_scales(params, rules), shapes)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"quantization.bits={c.bits:g}, outer_bits={c.outer_bits:g}, "
            f"quantizer={c.quantizer!r}, granularity={c.granularity!r}, "
            f"group_size={c.group_size}: {error}"
        ) from None
    adaptation = make_adaptation(c, shapes, rules, quantizer_of)
    product = make_product(rules, activation)
    return Quantized(rules, product, adaptation, activation, *_make_cache(c.cache, model))


def _make_cache(kind: str, model: Model | None) -> tuple[Any, Any]:
    """The quantizer of the cache, and the function that gives its first scales; None for both."""
    bits = CACHES[kind]
    if not bits or model is None:
        return None, None
    quantizer = make_cache_quantizer(bits, model.config.head_width)
    return quantizer, functools.partial(first_key_scales, model, bits=bits)


def quantized_while_running(
    c: ConfigDict, model: Model, params: Any, key_scales: Any = None
) -> tuple[Trained, Quantized | None]:
    """A model that is quantized after training, as its packed file will be read.

    Args:
      c: the `quantization` section, of which `activations` and `cache` count.
      model: of the parameters.
      params: on their grids, or in full precision.
      key_scales: of `calibrate_cache`; None without a quantized cache.

    Returns:
      What to evaluate and to sample with, and what a forward pass rounds: for `make_eval_step`, and
      for `Sampler`. The second is None where nothing is rounded.

    Raises:
      InputError: as `make_quantized`, or a cache without scales, or scales without a cache.
    """
    if (c.cache != "none") != (key_scales is not None):
        given = "without" if key_scales is None else "with"
        raise InputError(
            f"quantization.cache={c.cache} {given} scales of keys: int8 and int4 need those of "
            "calibrate_cache, and none takes none"
        )
    section = c.copy_and_resolve_references()
    section.update(bits=float(FULL_PRECISION), widths="", adapt_every=0, begin_with="weights")
    scales = jax.tree.map(lambda _: (), params)
    if key_scales is not None:
        scales[KEYS] = key_scales
    return Trained(params, scales), make_quantized(section, params, model)


def is_on(c: ConfigDict) -> bool:
    """Whether the `quantization` section changes anything."""
    return has_grids(c) or c.activations != "none" or c.cache != "none"


def has_grids(c: ConfigDict) -> bool:
    """Whether the `quantization` section puts any weights on grids."""
    return c.bits < FULL_PRECISION or bool(c.widths)


def make_product(
    rules: Rules, activation: Callable[[jax.Array], jax.Array] | None = None
) -> Callable[..., jax.Array]:
    """activation(x) @ quantize(w), of which only x, w and the scale are kept for the backward pass.

    Otherwise the scan over layers would keep every layer's quantized weights: a second copy of the
    model. To quantize once more costs one pass over the weights, which is little beside the
    product of B * T tokens.
    """

    def product(path, x_BTI, w_IO, scale):
        quantizer = rules(path)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def multiply(x_BTI, w_IO, scale):
            on_grid_IO = w_IO if quantizer is None else quantizer.quantize(w_IO, scale)
            x_BTI = activation(x_BTI) if activation else x_BTI
            return project(x_BTI, on_grid_IO.astype(x_BTI.dtype))

        return multiply(x_BTI, w_IO, scale)

    return product


class Phases(NamedTuple):
    """How the steps of a run are shared out.

    Attributes:
      steps: all of them.
      switch: the first step with quantization; `steps` when there is none.
      fused: whether one learning-rate schedule runs through both phases.
    """

    steps: int
    switch: int
    fused: bool = True

    @property
    def fraction(self) -> float:
        """Share of the steps with quantization."""
        return 1 - self.switch / self.steps


def plan_phases(config: ConfigDict, parameters: int) -> Phases:
    """The switch at round((1 - fraction) * steps) of the `quantization` section.

    "optimal" is `optimal_qat_fraction` of all tokens, padding included, and of all parameters, at
    `quantization.bits`, whatever widths single layers have.

    Raises:
      InputError: a fraction outside of [0, 1], or "optimal" with at most one token for every byte
        of quantized parameters, where the law has no quantized phase.
    """
    c, steps = config.quantization, config.train.steps
    if not is_on(c):
        return Phases(steps, steps)
    if c.fraction == "optimal":
        tokens = steps * config.train.batch_size * config.data.sequence_length
        fraction = optimal_qat_fraction(tokens, parameters, c.bits)
        if not fraction:
            raise InputError(
                f"quantization.fraction='optimal' needs more than one token a byte of quantized "
                f"parameters; {tokens:,} tokens and {parameters:,} parameters of "
                f"quantization.bits={c.bits:g} are {tokens / (parameters * c.bits / 8):.3g}: train "
                "longer or give a number"
            )
    else:
        try:
            fraction = float(c.fraction)
        except ValueError:
            fraction = -1.0
        if not 0 <= fraction <= 1:
            raise InputError(
                f"quantization.fraction={c.fraction!r} must be a number from 0 to 1 or 'optimal'"
            )
    return Phases(steps, round((1 - fraction) * steps), c.fused_cooldown)
