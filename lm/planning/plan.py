"""What a run costs, counted before it is started: nothing here is allocated, compiled or printed.

Bytes are those of the train state. Gradients and activations come on top; how many they are is the
compiler's decision, which `lm.planning.ahead` asks for.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from lm.compression.packed import stored_bytes
from lm.compression.phases import Quantized, make_quantized
from lm.data import tokenizers
from lm.errors import InputError
from lm.model.config import CHOICES
from lm.parallel.mesh import Whole, unsharded
from lm.planning.flops import parameters_by_group
from lm.references.second_models import open_references
from lm.training import experiment
from lm.training.state import parameter_shapes
from objectives.quantization import optimal_qat_fraction
from objectives.quantization.optimal_qat import tokens_per_parameter_byte


class Parameters(NamedTuple):
    """Numbers of parameters: all, and under each top-level name of the tree."""

    total: int
    by_group: dict[str, int]


class Bytes(NamedTuple):
    """Bytes of arrays: of one copy of each, and of what one device holds of them."""

    total: int
    per_device: int


class Plan(NamedTuple):
    """What `make_plan` counts.

    Attributes:
      devices: number of devices.
      mesh: size of each mesh axis.
      vocab_size: V.
      parameters: numbers of parameters.
      bytes: of the parts of the train state that hold anything (parameters, optimizer, ema,
        weighting), of the whole `state` with its counters, and of the second models that are
        `references`.
      unsharded: the largest parameters that every device holds whole, largest first; empty on one
        device.
      unsharded_parameters: number of parameters in all such leaves, listed or not.
      flops_per_token: model FLOPs, 6 N + 12 L T D; see `flops_per_token`. Forward passes
        of second models are not in it.
      tokens_per_step: B T, padding and zero weights included.
      flops_per_step: flops_per_token x tokens_per_step, over all devices.
      tokens: of the whole run, tokens_per_step x train.steps.
      flops: of the whole run, without its evaluations.
      checkpoint_bytes: of one checkpoint before compression: one copy of the state.
    """

    devices: int
    mesh: dict[str, int]
    vocab_size: int
    parameters: Parameters
    bytes: dict[str, Bytes]
    unsharded: tuple[Whole, ...]
    unsharded_parameters: int
    flops_per_token: int
    tokens_per_step: int
    flops_per_step: int
    tokens: int
    flops: int
    checkpoint_bytes: int


def make_plan(run: experiment.Experiment, listed: int = 5) -> Plan:
    """Counts parameters, bytes, tokens and FLOPs of a run.

    Args:
      run: from `experiment.build`, for devices or for a number of them.
      listed: length of `Plan.unsharded` at most.

    Raises:
      InputError: a reference has no source.
    """
    state = run.abstract_state()
    parts = {
        "parameters": state.trained,
        "optimizer": state.optimizer,
        "ema": state.ema,
        "objective": state.objective,
    }
    sizes = {name: count_bytes(part) for name, part in parts.items()}
    whole = count_bytes(state)
    references = count_bytes(open_references(run).abstract())
    shapes = parameter_shapes(run.model)
    groups = parameters_by_group(shapes)
    unsplit = unsharded(run.mesh, shapes, run.model.axes()) if run.mesh.size > 1 else []
    c = run.config
    tokens_per_step = c.train.batch_size * c.data.sequence_length
    flops_per_token = run.flops_per_token()
    return Plan(
        devices=run.mesh.size,
        mesh=dict(run.mesh.shape),
        vocab_size=run.model.config.vocab_size,
        parameters=Parameters(sum(groups.values()), groups),
        bytes={name: size for name, size in sizes.items() if size.total}
        | {"state": whole}
        | ({"references": references} if references.total else {}),
        unsharded=tuple(unsplit[:listed]),
        unsharded_parameters=sum(math.prod(leaf.shape) for leaf in unsplit),
        flops_per_token=flops_per_token,
        tokens_per_step=tokens_per_step,
        flops_per_step=flops_per_token * tokens_per_step,
        tokens=tokens_per_step * c.train.steps,
        flops=flops_per_token * tokens_per_step * c.train.steps,
        checkpoint_bytes=whole.total,
    )


def count_bytes(tree: Any) -> Bytes:
    """Bytes of a tree of jax.ShapeDtypeStruct with shardings (or of arrays)."""
    total = per_device = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.shape) * leaf.dtype.itemsize
        per_device += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return Bytes(total, per_device)


class Width(NamedTuple):
    """What a run would be with `quantization.bits` of one value, all other keys unchanged.

    Attributes:
      bits: width of the layers' matrices; 16 is full precision. Of a plan of widths, those of
        all weights with their scales, for each parameter of the model.
      refused: why the quantizer cannot have it; the rest is None then, and "" otherwise.
      bytes: of the weights, codes packed, scales included.
      tokens_per_byte: S, tokens of the run / (parameters * bits / 8); see
        `objectives.quantization.optimal_qat_fraction`. None in full precision.
      optimal_fraction: what that function plans, 0 where S is at most 1. None in full precision.
      switch: the first quantized step of this run, for the width of the config only.
    """

    bits: float
    refused: str
    bytes: int | None = None
    tokens_per_byte: float | None = None
    optimal_fraction: float | None = None
    switch: int | None = None


# Every width that some quantizer has.
WIDTHS = (1.0, 1.58, *map(float, range(2, 9)), 16.0)


def compare_widths(run: experiment.Experiment) -> list[Width]:
    """Bytes of the weights and the planned split at each width of the config's quantizer.

    With quantization.widths the last row is that of the plan; the others are without it.
    """
    shapes = run.abstract_state().trained.params
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    c = run.config
    tokens = c.train.steps * c.train.batch_size * c.data.sequence_length
    rows = []
    for bits in WIDTHS:
        section = c.quantization.copy_and_resolve_references()
        section.update(bits=bits, widths="", adapt_every=0)
        try:
            quantized = make_quantized(section, shapes)
        except InputError as error:
            rows.append(Width(bits, str(error)))
            continue
        if quantized is None:
            rows.append(Width(bits, "", count_bytes(shapes).total))
            continue
        ratio = tokens_per_parameter_byte(tokens, count, bits)
        fraction = optimal_qat_fraction(tokens, count, bits)
        planned = bits == c.quantization.bits and not c.quantization.widths
        switch = run.phases.switch if planned else None
        rows.append(Width(bits, "", _packed_bytes(shapes, quantized), ratio, fraction, switch))
    if c.quantization.widths:
        size = _packed_bytes(shapes, run.quantized)
        rows.append(Width(8 * size / count, "", size, switch=run.phases.switch))
    return rows


def weight_bytes(section: ConfigDict, shapes: Any) -> int:
    """Bytes of parameters of these shapes under a `quantization` section, codes packed.

    Raises:
      InputError: a width that the quantizer lacks, a group that does not divide a matrix.
    """
    quantized = make_quantized(section, shapes)
    return _packed_bytes(shapes, quantized) if quantized else count_bytes(shapes).total


def _packed_bytes(shapes: Any, quantized: Quantized) -> int:
    def of_leaf(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return stored_bytes(quantized.rules(name), leaf)

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(of_leaf, shapes)))


class Interface(NamedTuple):
    """What the model costs with one value of `model.embedding`.

    Attributes:
      embedding: the value.
      refused: why the config cannot have it; the rest is None then, and "" otherwise.
      parameters: numbers of parameters.
      bytes: as in `Plan`.
    """

    embedding: str
    refused: str
    parameters: Parameters | None = None
    bytes: dict[str, Bytes] | None = None


def compare_interfaces(
    config: ConfigDict,
    vocab_size: int,
    devices: Any = None,
    embeddings: Iterable[str] = CHOICES["embedding"],
) -> list[Interface]:
    """The cost of each input interface, all other keys of the config unchanged."""
    rows = []
    for name in embeddings:
        changed = config.copy_and_resolve_references()
        changed.model.embedding = name
        try:
            plan = make_plan(experiment.build(changed, vocab_size, devices))
        except InputError as error:
            rows.append(Interface(name, str(error)))
        else:
            rows.append(Interface(name, "", plan.parameters, plan.bytes))
    return rows


def vocabulary(c: ConfigDict) -> int:
    """Entries of the vocabulary of a `data` section, without loading or training on a corpus.

    `data.vocab_size` when it is set; otherwise those of the bytes or of the tokenizer.json.

    Raises:
      InputError: neither is known.
    """
    if c.vocab_size < 0:
        raise InputError(f"data.vocab_size={c.vocab_size} must be 0 or above")
    if c.tokenizer == "bpe" and c.vocab_size >= 257:
        return c.vocab_size
    # A misspelt name and a bpe that is too small are errors even where the size is given.
    asked = c.vocab_size if c.tokenizer == "bpe" else 0
    own = tokenizers.load(
        c.tokenizer,
        asked,
        (),
        directory=c.directory,
        end_of_text=c.end_of_text,
        beginning_of_text=c.beginning_of_text,
    ).vocab_size
    return c.vocab_size or own


def as_dict(value: Any) -> Any:
    """Named tuples as dictionaries, all the way down, for JSON."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: as_dict(part) for name, part in value.items()}
    return [as_dict(part) for part in value] if isinstance(value, tuple | list) else value
