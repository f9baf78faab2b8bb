"""The plan of widths of least harm within a budget of bytes.

n items, each one layer of one matrix, and p widths.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lm.compression.packed import stored_bytes
from lm.compression.sensitivity import Batch, Sensitivity, Subject, leaves, measured, qig
from lm.compression.snip import snip
from lm.compression.widths import FULL_PRECISION, OfWidth, Widths, of_width
from lm.errors import InputError
from lm.model.config import check_choice
from lm.model.interface import Model
from lm.model.parameters import LAYERS, layer_matrices
from objectives.quantization.allocation import allocate
from objectives.quantization.qat import Rules

# Name -> factory.
SENSITIVITIES = {"snip": snip, "measured": measured, "qig": qig}


def plan_widths(
    model: Model,
    params: Any,
    batches: Sequence[Batch],
    budget: float,
    sensitivity: Sensitivity,
    *,
    rules: Rules,
    choices: Sequence[float] = (2, 3, 4, 8),
    quantizer_of: OfWidth | None = None,
) -> Widths:
    """The widths of the layers' matrices that cost least within a budget of bytes.

    Args:
      model: of `params`.
      params: the trained parameters.
      batches: to find sensitivities with, such as training batches.
      budget: bytes of all tensors of the packed file: codes and scales of all parameters, those
        that are not planned included. The header of the file is not counted.
      sensitivity: `snip`, `measured` or `qig`, made with its options.
      rules: of the parameters that are not planned: embedding, head and vectors.
      choices: the widths to choose from.
      quantizer_of: of `widths.of_width`, for the matrices; ParetoQ's by default.

    Raises:
      InputError: no batches, a budget that is too small, which names the least, or a width that
        the quantizer does not have (16 bits among them: full precision is for all layers or none).
    """
    if not batches:
        raise InputError("sensitivities need at least one batch")
    paths = tuple(f"{LAYERS}/{name}" for name in layer_matrices(params[LAYERS]))
    subject = Subject(model, params, batches, quantizer_of or of_width(), tuple(choices), paths)
    try:
        if not choices or any(bits >= FULL_PRECISION for bits in choices):
            raise ValueError(f"must be at least one, and below {FULL_PRECISION} bits")
        sizes = layer_bytes(subject)
    except ValueError as error:
        raise InputError(f"widths {', '.join(f'{b:g}' for b in choices)}: {error}") from None
    others = other_bytes(params, paths, rules)
    least = others + sizes.min(axis=1).sum()
    if budget < least:
        raise InputError(
            f"a budget of {budget:,.0f} bytes is too small for widths from {min(choices):g} bits; "
            f"the least is {least:,.0f} bytes"
        )
    return choose(subject, sensitivity(subject), sizes, budget - others)


def make_sensitivity(name: str, optimizer: ConfigDict, key: str = "--sensitivity") -> Sensitivity:
    """A sensitivity by name, "snip" with the learning rate and the momentum of a run.

    Args:
      name: a key of `SENSITIVITIES`.
      optimizer: the `optimizer` section of the run.
      key: where the name comes from, for messages.

    Raises:
      InputError: another name.
    """
    check_choice(key, name, tuple(SENSITIVITIES))
    if name != "snip":
        return SENSITIVITIES[name]()
    rate = optimizer.peak_learning_rate
    return snip(learning_rate=rate, beta1=optimizer.beta1, beta2=optimizer.beta2)


def choose(subject: Subject, costs: np.ndarray, sizes: np.ndarray, budget: float) -> Widths:
    """The plan of `allocate` as widths by path.

    Raises:
      InputError: costs that are not finite.
      ValueError: a budget that is too small.
    """
    if not np.isfinite(costs).all():
        path, layer = subject.items()[int(np.argwhere(~np.isfinite(costs))[0][0])]
        raise InputError(f"the sensitivity of {path}, layer {layer}, is not finite")
    chosen = allocate(costs, sizes, budget).reshape(len(subject.paths), -1)
    return {
        path: tuple(subject.choices[p] for p in row)
        for path, row in zip(subject.paths, chosen, strict=True)
    }


def layer_bytes(subject: Subject) -> np.ndarray:
    """Bytes of codes and scales of every item at every width, [n, p]."""
    stacks, sizes = leaves(subject.params), []
    for path, _ in subject.items():
        one = jax.ShapeDtypeStruct(stacks[path].shape[1:], stacks[path].dtype)
        sizes.append([stored_bytes(q, one) for q in subject.quantizers(path)])
    return np.array(sizes, np.float64)


def other_bytes(params: Any, paths: Sequence[str], rules: Rules) -> int:
    """Bytes of all parameters but those at `paths`, under their rules."""
    return sum(
        stored_bytes(rules(path), leaf)
        for path, leaf in leaves(params).items()
        if path not in paths
    )
