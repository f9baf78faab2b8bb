"""Flags of launch.quantize, checked, and the quantizers that they ask for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import command
from lm.errors import InputError
from lm.model.config import check_choice

BITS = flags.DEFINE_float(
    "bits", None, "Width of the layers' matrices, to quantize after training."
)
METHOD = flags.DEFINE_string(
    "method",
    "rtn",
    "rtn (round to nearest), gptq, rsq (GPTQ, tokens weighted by attention), awq, or "
    "outlier_suppression (of quantized --activations).",
)
QUANTIZER = flags.DEFINE_string("quantizer", "absmax", "A name of objectives/quantization.")
GRANULARITY = flags.DEFINE_string("granularity", None, "tensor, channel or group.")
GROUP_SIZE = flags.DEFINE_integer("group_size", None, "Inputs in a group; of granularity group.")
OUTER_BITS = flags.DEFINE_float(
    "outer_bits", 4.0, "Least width of the embedding and the head; 16 keeps them as they are."
)
ACTIVATIONS = flags.DEFINE_string(
    "activations", "none", "none, int4 to int8, fp8_e4m3 or fp8_e5m2: inputs of the products."
)
CACHE = flags.DEFINE_string("cache", "none", "none, int8 or int4: keys and values of attention.")
ROTATE = flags.DEFINE_bool(
    "rotate",
    None,
    "Rotate the residual stream first, the function staying as it is; by default with rsq.",
)
SCALE_SEARCH = flags.DEFINE_bool(
    "scale_search",
    None,
    "Scales of least error instead of the largest weight's; by default with gptq and rsq where the "
    "quantizer has a search.",
)
BATCHES = flags.DEFINE_integer(
    "calibration_batches", 8, "Training batches for all that needs text but losses."
)
VALIDATION = flags.DEFINE_integer(
    "validation_batches",
    None,
    "Batches of the validation split that losses are of; all by default.",
)
DAMPING = flags.DEFINE_float("damping", 0.01, "gptq, rsq: share of the mean diagonal added to it.")
ACT_ORDER = flags.DEFINE_bool(
    "act_order", True, "gptq, rsq: inputs with the largest Hessian first; scales as before that."
)
TRUE_SEQUENTIAL = flags.DEFINE_bool(
    "true_sequential", False, "gptq, rsq: Hessians behind the matrices before, inside of a layer."
)
WIDTHS = flags.DEFINE_string(
    "widths", None, "FILE.json: path of a parameter -> bits of each of its layers, over --bits."
)
BUDGET = flags.DEFINE_integer(
    "budget", None, "Bytes of all weights: widths of the layers are chosen by --sensitivity."
)
SENSITIVITY = flags.DEFINE_string("sensitivity", "qig", "snip, measured or qig; of --budget.")
CHOICES = flags.DEFINE_list("choices", ["2", "3", "4", "8"], "Widths that --budget chooses from.")
SAVE_WIDTHS = flags.DEFINE_string("save_widths", None, "FILE.json for the plan of --budget.")
SCALES = flags.DEFINE_string(
    "scales",
    "float32",
    "float32 | float16 | bfloat16: type that scales are rounded to before the last evaluation; "
    "launch.export needs that of its format.",
)
METRICS = flags.DEFINE_string(
    "metrics", None, "Folder with the metrics.jsonl that gets the losses, too."
)
REPORT = flags.DEFINE_string(
    "report", None, "HTML page to write: errors, weights, scales, losses and bytes."
)
OTHERS = flags.DEFINE_list(
    "others", [], "METHOD or METHOD:BITS,... that --report shows beside this one."
)


def check() -> None:
    """Refuses what needs no model to be seen wrong."""
    from lm.compression.cache import CACHES
    from lm.compression.methods import METHODS
    from lm.compression.phases import ACTIVATIONS as KINDS

    after = (
        "method",
        "quantizer",
        "granularity",
        "group_size",
        "outer_bits",
        "scale_search",
        "rotate",
        "activations",
        "cache",
    )
    after += ("calibration_batches", "damping", "act_order", "true_sequential", "widths", "budget")
    for name in after:
        if BITS.value is None and flags.FLAGS[name].present:
            raise InputError(f"--{name} needs --bits=WIDTH; without, the run's own grids are taken")
    if not (command.OUTPUT.value or REPORT.value):
        raise InputError("--output=FILE is missing, for example --output=int4.safetensors")
    if REPORT.value and BITS.value is not None and BITS.value >= 16:
        raise InputError(
            f"--report shows quantized weights; valid: --bits below 16, not {BITS.value:g}"
        )
    if OTHERS.value and not REPORT.value:
        raise InputError("--others needs --report=PAGE.html")
    _check_plan()
    for flag in (command.OUTPUT, REPORT, SAVE_WIDTHS):
        folder = Path(flag.value or ".").parent
        if not folder.is_dir():
            raise InputError(f"--{flag.name}={flag.value}: there is no folder {folder}")
    check_choice("--method", METHOD.value, tuple(METHODS))
    check_choice("--activations", ACTIVATIONS.value, tuple(KINDS))
    check_choice("--cache", CACHE.value, tuple(CACHES))
    check_choice("--scales", SCALES.value, ("float32", "float16", "bfloat16"))
    compared()
    for flag in (BATCHES, VALIDATION):
        if flag.value is not None and flag.value < 1:
            raise InputError(f"--{flag.name}={flag.value} must be at least 1")
    if not 0 < DAMPING.value < 1:
        raise InputError(f"--damping={DAMPING.value:g} must be above 0 and below 1")


def _check_plan() -> None:
    """Refuses flags of a plan that do not go together."""
    from lm.compression.plan_widths import SENSITIVITIES

    if WIDTHS.value and BUDGET.value:
        raise InputError("--widths and --budget are two plans: give one of them")
    for name in ("sensitivity", "choices", "save_widths"):
        if flags.FLAGS[name].present and not BUDGET.value:
            raise InputError(f"--{name} needs --budget=BYTES")
    check_choice("--sensitivity", SENSITIVITY.value, tuple(SENSITIVITIES))
    try:
        [float(bits) for bits in CHOICES.value]
    except ValueError:
        raise InputError(f"--choices={','.join(CHOICES.value)}: valid: widths as 2,3,4") from None


def compared() -> Sequence[tuple[str, float]]:
    """(method, bits) of every entry of --others."""
    from lm.compression.methods import METHODS

    found = []
    for entry in OTHERS.value:
        method, _, bits = entry.partition(":")
        check_choice("--others", method, tuple(METHODS))
        try:
            width = float(bits) if bits else BITS.value
        except ValueError:
            width = None
        if width is None:
            raise InputError(f"--others={entry}: valid: METHOD:BITS, such as gptq:4")
        found.append((method, width))
    return found


def make_rules(method: str, bits: float) -> tuple[Any, Any]:
    """Rules at one width, and (path, bits) -> quantizer with the same options."""
    from lm.compression.methods import SEARCHING
    from lm.compression.phases import default_rules, with_search
    from lm.compression.widths import of_width
    from objectives.quantization import QUANTIZERS
    from objectives.quantization.scale_search import SEARCHED

    name = QUANTIZER.value
    check_choice("--quantizer", name, tuple(QUANTIZERS))
    factory, search = QUANTIZERS[name], SCALE_SEARCH.value
    if search is None:
        search = method in SEARCHING and name in SEARCHED
    layout = {"granularity": GRANULARITY.value, "group_size": GROUP_SIZE.value}
    layout = {option: value for option, value in layout.items() if value is not None}
    try:
        made = with_search(factory) if search else factory
        rules = default_rules(bits, made, outer_bits=OUTER_BITS.value, **layout)
        return rules, of_width(made, **layout)
    except ValueError as error:
        raise InputError(f"--quantizer={name} --bits={bits:g}: {error}") from None
