"""From the config of an ablation to its runs: checked, matched with the baseline, and counted.

The form of the config is that of configs/ablation.py. Nothing here runs or prints.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lm import strict_json
from lm.compression.methods import METHODS
from lm.errors import InputError
from lm.flat import leaves
from lm.model.config import check_choice
from lm.planning import plan
from lm.planning.flops import parameters_by_group
from lm.references.second_models import open_references
from lm.references.sources import BASE, EMA
from lm.runs import initialise
from lm.training import experiment

MATCHES = ("tokens", "flops", "time", "none")

# Keys of a variant that is a finished run quantized by launch.quantize: flags of that command.
QUANTIZE = (
    "bits",
    "method",
    "quantizer",
    "granularity",
    "group_size",
    "outer_bits",
    "scale_search",
    "rotate",
    "calibration_batches",
    "damping",
    "act_order",
    "true_sequential",
)

_PLACE = re.compile(r"\{([^{}]*)\}")  # {variant}: its work directory
# The folder of the runs that measure tokens per second.
RATES = "rates"

_NAME = re.compile(r"[\w][\w.,=+-]*")  # a folder that no shell takes apart


class Variant(NamedTuple):
    """A named change of the base.

    Attributes:
      name: of the variant, and of its folder.
      changes: key -> value.
      compared: whether it is in the table; otherwise others need its runs.
    """

    name: str
    changes: Mapping[str, Any]
    compared: bool

    @property
    def quantizes(self) -> bool:
        """Whether it is a finished run that is quantized, and no training."""
        return any(key.startswith("quantize.") for key in self.changes)

    @property
    def needs(self) -> tuple[str, ...]:
        """The variants that it names the work directories of."""
        found = (_PLACE.findall(v) for v in self.changes.values() if isinstance(v, str))
        return tuple(dict.fromkeys(name for names in found for name in names))


class Ablation(NamedTuple):
    """What the config of an ablation says; `variants` by name, each after those that it needs."""

    base: ConfigDict
    variants: dict[str, Variant]
    seeds: tuple[int, ...]
    baseline: str
    match: str
    confidence: float


class Planned(NamedTuple):
    """A variant, checked and counted.

    Attributes:
      variant: itself.
      config: of its training (of the run that it quantizes), of the first seed, with names of
        variants still in braces.
      parameters: N.
      tokens_per_step: B T.
      flops_per_token: model FLOPs as in `lm.planning.plan`, and of a forward pass of each second
        model (a third of that model's).
      weight_bytes: of the trained weights, codes packed.
      state_bytes: of the train state.
      bits: width of the layers' matrices.
      switch: the first quantized step; `steps` where there is none.
    """

    variant: Variant
    config: ConfigDict
    parameters: int
    tokens_per_step: int
    flops_per_token: float
    weight_bytes: int
    state_bytes: int
    bits: float
    switch: int

    @property
    def steps(self) -> int:
        """Steps of the training."""
        return self.config.train.steps

    @property
    def tokens(self) -> int:
        """Tokens of the training, padding included."""
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Model FLOPs of the training."""
        return self.tokens * self.flops_per_token


def read(config: ConfigDict) -> Ablation:
    """Checks the form of an ablation: names, keys, types, and what needs what.

    Raises:
      InputError: one line that names the variant and the key.
    """
    if not isinstance(config.get("base"), ConfigDict) or "variants" not in config:
        raise InputError(
            "the config of an ablation has base, variants, seeds and baseline: see "
            "configs/ablation.py; a config of one run is for launch.train"
        )
    check_choice("match", config.match, MATCHES)
    seeds = tuple(config.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(s) is int for s in seeds):
        raise InputError(f"seeds={seeds} must be different whole numbers, at least one")
    if not 0 < config.confidence < 1:
        raise InputError(f"confidence={config.confidence} must be between 0 and 1")
    variants = {}
    for compared, group in ((True, config.variants), (False, config.shared)):
        for name, changes in group.items():
            if name in variants:
                raise InputError(f"variant {name!r} is in variants and in shared")
            variants[name] = Variant(name, dict(changes), compared)
    if config.baseline not in config.variants:
        raise InputError(
            f"baseline={config.baseline!r} is no variant; valid: {', '.join(config.variants)}"
        )
    for key, value in leaves(config.base):
        if isinstance(value, str) and _PLACE.search(value):
            raise InputError(f"base has {key}={value!r}: names in braces are for variants")
    for variant in variants.values():
        _check_form(variant, variants, config.base, config.match)
    ordered = {name: variants[name] for name in _in_order(variants)}
    return Ablation(
        config.base, ordered, seeds, config.baseline, config.match, float(config.confidence)
    )


def _check_form(variant: Variant, variants, base: ConfigDict, match: str) -> None:
    here = f"variant {variant.name!r}"
    if not _NAME.fullmatch(variant.name) or variant.name == RATES:
        raise InputError(f"{here}: a name has letters, digits and . , = + - _ only")
    for name in variant.needs:
        if name not in variants or variants[name].quantizes:
            raise InputError(f"{here}: {{{name}}} is no variant that is trained")
    if variant.quantizes:
        known = ["quantize.run", *(f"quantize.{flag}" for flag in QUANTIZE)]
        for key in variant.changes:
            check_choice(f"{here}: key", key, tuple(known))
        method = variant.changes.get("quantize.method", "rtn")
        check_choice(f"{here}: quantize.method", method, tuple(METHODS))
        if len(variant.needs) != 1 or "quantize.bits" not in variant.changes:
            raise InputError(f"{here} needs quantize.run='{{VARIANT}}' and quantize.bits=WIDTH")
        return
    changed = base.copy_and_resolve_references()
    for key, value in variant.changes.items():
        _set(changed, key, value, here)
    if "train.steps" in variant.changes and match != "none" and variant.compared:
        raise InputError(f"{here}: match={match!r} decides train.steps; valid: match='none'")
    if "train.seed" in variant.changes:
        raise InputError(f"{here}: train.seed is that of seeds, in every variant")


def _set(config: ConfigDict, key: str, value: Any, here: str) -> None:
    valid = dict(leaves(config))
    if key not in valid:
        near = difflib.get_close_matches(key, valid, n=1)
        near += [other for other in valid if other.split(".")[-1] == key.split(".")[-1]]
        raise InputError(
            f"{here}: no such key {key}" + (f" (did you mean {near[0]}?)" * bool(near))
        )
    try:
        config.update_from_flattened_dict({key: value})
    except TypeError:
        kind, ours = type(value).__name__, type(valid[key]).__name__
        raise InputError(f"{here}: {key}={value!r} is {kind}; valid: {ours}") from None


def _in_order(variants: Mapping[str, Variant]) -> list[str]:
    """Names, each after those that it needs, otherwise as they are given."""
    done: list[str] = []

    def visit(name, above):
        if name in above:
            raise InputError(f"variant {name!r} needs itself: {' > '.join((*above, name))}")
        for need in variants[name].needs:
            visit(need, (*above, name))
        if name not in done:
            done.append(name)

    for name in variants:
        visit(name, ())
    return done


def make_plan(
    ablation: Ablation, devices: int, rates: Mapping[str, float] | None = None
) -> dict[str, Planned]:
    """Checks every variant as launch.train would, matches it, and counts what it costs.

    Corpora and tokenizers are prepared here, once, and are in the cache when the runs start.

    Args:
      ablation: from `read`.
      devices: number of devices of a run.
      rates: variant -> tokens per second, needed to match by time; without them steps are those of
        the base.

    Raises:
      InputError: one line that names the variant and the key.
    """
    loaded: dict[str, experiment.Data] = {}
    built: dict[str, experiment.Experiment] = {}
    planned: dict[str, Planned] = {}

    def check(name: str, steps: int | None) -> None:
        variant = ablation.variants[name]
        config = _config(ablation, variant)
        if steps:
            config.train.steps = steps
        section = strict_json.dumps(config.data.to_dict(), sort_keys=True)
        if section not in loaded:
            loaded[section] = experiment.load_data(config.data)
        data = loaded[section]
        config = experiment.resolve(config, data.train)
        run = built[name] = experiment.build(config, data.tokenizer.vocab_size, devices)
        if source := variant_in(config.quantization["from"]):
            initialise.other_run(run, built[source].config, f"quantization.from={{{source}}}")
        planned[name] = _count(variant, run, planned, data.tokenizer.fingerprint)

    def match(name: str) -> None:
        variant = ablation.variants[name]
        if variant.quantizes:
            planned[name] = _after_training(variant, planned[variant.needs[0]], built)
            return
        check(name, None)
        if "train.steps" in variant.changes:  # of a run that is not compared
            return
        baseline = planned[ablation.baseline]
        steps = matched_steps(ablation.match, baseline, planned[name], rates)
        if steps != planned[name].steps:
            check(name, steps)

    first = with_needs(ablation.variants, ablation.baseline)
    for name in [*first, *(n for n in ablation.variants if n not in first)]:
        try:
            # What the baseline needs is as long as the base says; all else is matched with it.
            if name in first and not ablation.variants[name].quantizes:
                check(name, None)
            else:
                match(name)
        except InputError as error:
            raise InputError(f"variant {name!r}: {error}") from None
    _save_switches(planned)
    return {name: planned[name] for name in ablation.variants}


def with_needs(variants: Mapping[str, Variant], name: str) -> list[str]:
    """A variant's name after those of all variants that it needs."""
    needed = [other for need in variants[name].needs for other in with_needs(variants, need)]
    return list(dict.fromkeys([*needed, name]))


def matched_steps(
    match: str, baseline: Planned, variant: Planned, rates: Mapping[str, float] | None = None
) -> int:
    """train.steps with which a variant gets as much as the baseline has.

    tokens: steps B T are equal. flops: steps B T F with F model FLOPs of a token. time: steps B T /
    rate, with rates in tokens per second measured before; the protocol of Languini (arXiv
    2309.11197), whose steps are rate x seconds / (B T), with the baseline's time as the budget.
    """
    steps = baseline.tokens / variant.tokens_per_step
    if match == "flops":
        steps *= baseline.flops_per_token / variant.flops_per_token
    elif match == "time" and rates:
        steps *= rates[_trained(variant)] / rates[_trained(baseline)]
    elif match == "none":
        return variant.steps
    return max(1, round(steps))


def _trained(one: Planned) -> str:
    """The variant that was trained."""
    return one.variant.needs[0] if one.variant.quantizes else one.variant.name


def _config(ablation: Ablation, variant: Variant) -> ConfigDict:
    config = ablation.base.copy_and_resolve_references()
    for key, value in variant.changes.items():
        _set(config, key, value, f"variant {variant.name!r}")
    config.train.seed = ablation.seeds[0]
    return config


def variant_in(value: str) -> str:
    """The name in braces, "" where there is none."""
    found = _PLACE.fullmatch(value)
    return found[1] if found else ""


def _count(variant: Variant, run: experiment.Experiment, planned, tokenizer: str) -> Planned:
    c, state = run.config, run.abstract_state()
    second = {c.objective.references[name] for name in run.references()}
    forward = sum(
        planned[variant_in(source)].flops_per_token / 3 for source in second if variant_in(source)
    )
    forward += run.flops_per_token() / 3 * len({EMA, BASE} & second)
    if not any(map(variant_in, second)):
        opened = open_references(run, tokenizer)
        forward += sum(model.run.flops_per_token() / 3 for model in opened.models.values())
    return Planned(
        variant,
        c,
        sum(parameters_by_group(state.trained.params).values()),
        c.train.batch_size * c.data.sequence_length,
        run.flops_per_token() + forward,
        plan.weight_bytes(c.quantization, state.trained.params),
        plan.count_bytes(state).total,
        c.quantization.bits,
        run.phases.switch,
    )


def _after_training(variant: Variant, source: Planned, built) -> Planned:
    run, given = built[source.variant.name], variant.changes
    section = run.config.quantization.copy_and_resolve_references()
    section.update(bits=float(given["quantize.bits"]), activations="none")
    section.update(widths="", adapt_every=0)
    for key, value in (("quantizer", "absmax"), ("granularity", ""), ("group_size", 0)):
        section[key] = given.get(f"quantize.{key}", value)
    size = plan.weight_bytes(section, run.abstract_state().trained.params)
    return source._replace(variant=variant, weight_bytes=size, bits=section.bits)


def _save_switches(planned: dict[str, Planned]) -> None:
    """Has runs that others branch from save the steps at which they do."""
    for one in list(planned.values()):
        source = variant_in(one.config.quantization["from"])
        if source and one.switch and not one.variant.quantizes:
            config = planned[source].config
            config.checkpoint.at_steps = tuple(sorted({*config.checkpoint.at_steps, one.switch}))


def differences(planned: Mapping[str, Planned], baseline: str) -> dict[str, dict[str, Any]]:
    """Variant -> key -> its value, for every key in which its config differs from the baseline."""
    ours = dict(leaves(planned[baseline].config))
    found = {}
    for name, one in planned.items():
        keys = {k: v for k, v in leaves(one.config) if v != ours[k]}
        extra = dict(one.variant.changes) if one.variant.quantizes else {}
        found[name] = {k: v for k, v in keys.items() if k != "checkpoint.at_steps"} | extra
    return found
