"""Plans of bit widths: which width every layer of every matrix has.

As a file, a plan is one JSON object, path of a parameter -> list of the bits of its layers:

  {"layers/mlp/up": [4, 2, 3], "layers/mlp/down": [8, 4, 4], "head/kernel": [4]}

A parameter that is not stacked over layers has a list of one number. 16 bits are full precision,
for all layers of a parameter or for none.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lm import strict_json
from lm.errors import InputError, shown
from lm.model.parameters import LAYERS, parameter_kind, path_of
from objectives.quantization import Mixed, Quantizer, mixed, paretoq
from objectives.quantization.qat import Rules

# Path of a parameter -> bits of each of its layers.
Widths = Mapping[str, tuple[float, ...]]

# (path, bits) -> quantizer, or None for full precision.
OfWidth = Callable[[str, float], Quantizer | None]

FULL_PRECISION = 16
# Every width that some quantizer has.
KNOWN = (1, 1.58, *range(2, 9), FULL_PRECISION)
_QUANTIZED = ("matrix", "embedding", "head")


def of_width(factory: Callable[..., Quantizer | None] = paretoq, **layout: Any) -> OfWidth:
    """(path, bits) -> the quantizer of a parameter, the same object for the same width and layout.

    In contrast to `default_quantizers` the bits are taken as they are for embedding and head, too.

    Args:
      factory: takes bits, granularity, group_size and contraction_axis.
      **layout: granularity and group_size.

    Raises:
      From the function, ValueError: a width that the factory does not have.
    """

    @functools.cache
    def make(axis, bits):
        bits = int(bits) if bits == int(bits) else bits
        if bits >= FULL_PRECISION:
            return None
        return factory(bits=bits, contraction_axis=axis, **layout)

    def at(path, bits):
        return make(-1 if parameter_kind(path) == "embedding" else -2, bits)

    return at


def with_widths(
    rules: Rules, widths: Widths, quantizer_of: OfWidth, choices: Sequence[float] = ()
) -> Rules:
    """`rules`, but for the parameters of a plan, which are on the widths of the plan.

    Args:
      rules: of the other parameters.
      widths: the plan.
      quantizer_of: of `of_width`.
      choices: widths that the layers of stacked parameters may be put on later; without them, a
        parameter of one width has a plain quantizer.

    Raises:
      InputError: a width that the quantizer does not have, or widths that make no stack.
    """
    planned = {path: _of_layers(path, bits, quantizer_of, choices) for path, bits in widths.items()}
    return lambda path: planned[path] if path in planned else rules(path)


def _of_layers(path, bits, quantizer_of, choices) -> Quantizer | Mixed | None:
    try:
        quantizers = [quantizer_of(path, width) for width in bits]
        if None in quantizers:
            if any(quantizers):
                raise ValueError("16 bits are for all layers or for none")
            return None
        if not path.startswith(f"{LAYERS}/") or not (choices or len(set(quantizers)) > 1):
            return quantizers[0]
        return mixed(quantizers, [quantizer_of(path, width) for width in choices])
    except ValueError as error:
        raise InputError(f"widths of {path}: {error}") from None


def as_json(widths: Widths) -> str:
    """The plan as one line of JSON, paths in order."""
    return strict_json.dumps({path: [_number(b) for b in widths[path]] for path in sorted(widths)})


def write_widths(path: str | os.PathLike, widths: Widths) -> None:
    """Writes a plan, one parameter a line.

    Raises:
      InputError: the file cannot be written.
    """
    lines = [
        f"  {strict_json.dumps(p)}: {strict_json.dumps([_number(b) for b in widths[p]])}"
        for p in widths
    ]
    try:
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def inline(value: str, key: str = "quantization.widths") -> str:
    """The JSON of a plan that is given as a file, on one line; JSON and '' as they are.

    So that the record of a run holds the plan itself.

    Raises:
      InputError: no such file, or it is not JSON.
    """
    if not value or value.lstrip().startswith("{"):
        return value
    return strict_json.dumps(_parse(value, key), sort_keys=True)


def read_widths(value: str, shapes: Any, key: str = "quantization.widths") -> Widths:
    """The plan of a file, or of the JSON itself, checked against the parameters of a model.

    Args:
      value: a file, or JSON that begins with "{".
      shapes: the parameters, or their shapes.
      key: where the value comes from, for messages.

    Raises:
      InputError: no such file, no JSON object of lists, a path that is no parameter that can be
        quantized, another number of layers, or no width that there is.
    """
    plan, where = _parse(value, key), _where(value, key)
    leaves = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    valid = [path for path in leaves if parameter_kind(path) in _QUANTIZED]
    if not isinstance(plan, dict) or not plan:
        raise InputError(f'{where}: must be an object such as {{"{valid[0]}": [4, 2]}}')
    for path, bits in plan.items():
        if path not in valid:
            raise InputError(
                f"{where}: {shown(path)} is no parameter that is quantized; valid: "
                + ", ".join(valid)
            )
        layers = leaves[path].shape[0] if path.startswith(f"{LAYERS}/") else 1
        if not isinstance(bits, list) or len(bits) != layers:
            raise InputError(
                f"{where}: {path} must have a list of {layers} widths; got {shown(bits)}"
            )
        for width in bits:
            if isinstance(width, bool) or width not in KNOWN:
                raise InputError(
                    f"{where}: {path} has the width {shown(width)}; valid: "
                    + ", ".join(f"{b:g}" for b in KNOWN)
                )
    return {path: tuple(bits) for path, bits in plan.items()}


def _where(value: str, key: str) -> str:
    return key if value.lstrip().startswith("{") else f"{key}={value}"


def _parse(value: str, key: str) -> Any:
    where = _where(value, key)

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise InputError(f"{where}: a parameter is there twice")
        return found

    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text()
        return json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: not JSON ({shown(str(error))})") from None


def _number(bits: float) -> float:
    return int(bits) if bits == int(bits) else bits
