"""A self-contained HTML page about the quantization of a model: losses, errors, weights, bytes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from launch import charts, document
from launch.document import Block, Details, Figure, Gallery, Heading, Items, Paragraph, Table
from lm.compression.report import Description, Layer, Matrix, Size
from lm.errors import InputError
from lm.model.parameters import LAYERS

_NAMES = {
    "matrix": "matrices of the layers",
    "embedding": "embedding",
    "head": "head",
    "other": "others",
}


class Run(NamedTuple):
    """One quantization of the model, for a row of the page's table.

    Attributes:
      method: such as "rtn" (round to nearest) or "gptq".
      bits: width of the layers' matrices.
      quantizer: name of its factory.
      granularity: "tensor", "channel" or "group".
      group_size: inputs in a group, 0 without groups.
      loss_before: validation loss of the model that was quantized, nats per token.
      loss_after: that on its grids.
      bits_per_byte: after.
      file_bytes: size of the file.
      bits_per_weight: of the file, scales and header included.
      seconds: that the method took; NaN where it is not known.
    """

    method: str
    bits: float
    quantizer: str
    granularity: str
    group_size: int
    loss_before: float
    loss_after: float
    bits_per_byte: float
    file_bytes: int
    bits_per_weight: float
    seconds: float = math.nan

    @property
    def loss_added(self) -> float:
        """What quantization costs, nats per token."""
        return self.loss_after - self.loss_before


def quantization_page(title: str, description: Description, runs: Sequence[Run]) -> str:
    """Returns the page: equal arguments give equal text.

    Args:
      title: name of the model; shown as it is given.
      description: of `lm.compression.report.describe`, for the first run.
      runs: the first is the one that the page is about, the others are compared with it.

    Raises:
      InputError: there is no run.
    """
    if not runs:
        raise InputError("there is no run of which a page could be written")
    first = runs[0]
    matrices = description.matrices
    best = _best_by_width(runs)
    blocks: list[Block] = [
        Paragraph(sentence(first, runs)),
        *[Items(best)] * bool(best),
        Heading("Runs"),
        _table(runs),
        Paragraph(
            "Losses are those of the validation split, nats per token. Recovered is the share of "
            "the loss added by rounding to nearest (rtn) that a method avoids with the same bits, "
            "quantizer and scales: (rounded - method) / (rounded - before)."
        ),
        *_loss_figure(runs),
    ]
    about = f"{_named(first)}, {_layout(first)}" + ", the first row above" * (len(runs) > 1)
    if matrices:
        blocks += [Heading("Error by matrix and layer"), Paragraph(f"What follows is of {about}.")]
        blocks += _errors(matrices)
        blocks += [Heading("Weights, codes and scales"), Paragraph(_HOW_TO_READ)]
        blocks += [Gallery([_distribution(matrix) for matrix in matrices])]
    blocks += [Heading("Bytes"), _bytes(description), Paragraph(_BYTES)]
    return document.page(blocks, f"Quantization of {title}")


_HOW_TO_READ = (
    "Upwards, blue: the weights before quantization, in units of the root mean square (rms) of "
    "their matrix. Downwards, orange: each code at the mean of the values that it stands for; its "
    "length says how often it is used. Below: the scales as powers of two. All layers together."
)
_BYTES = (
    "As they are stored, without the header of the file. Scales include the zeros of asymmetric "
    "grids; kept are weights that are not quantized."
)


def sentence(run: Run, runs: Sequence[Run]) -> str:
    """Returns what a run costs, and which share of the loss of rounding to nearest it avoids."""
    added = run.loss_added
    if not math.isfinite(added):
        return f"{_named(run)}, {_layout(run)}: the loss is not finite."
    verb = "adds" if added >= 0 else "takes off"
    text = (
        f"{_named(run)}, {_layout(run)}, {verb} {abs(added):.4f} nats a token: "
        f"{run.loss_before:.4f} before, {run.loss_after:.4f} after"
    )
    share = recovered(run, runs)
    if share is None:
        return f"{text}."
    if share < 0:
        return f"{text}. That is {-share:.0%} more than rounding to nearest adds."
    return f"{text}. It recovers {share:.0%} of the loss that rounding to nearest adds."


def _best_by_width(runs: Sequence[Run]) -> list[str]:
    """A sentence on the smallest loss at each width that several runs have."""
    best = []
    for bits in sorted({run.bits for run in runs}):
        found = [run for run in runs if run.bits == bits and math.isfinite(run.loss_added)]
        if len(found) < 2:
            continue
        run = min(found, key=lambda run: run.loss_added)
        share = recovered(run, runs)
        of_rounding = "" if share is None else f" and recovers {share:.0%}"
        best.append(
            f"{bits:g} bits: {run.method} ({_layout(run)}) adds the least of {len(found)} runs, "
            f"{run.loss_added:+.4f} nats{of_rounding}"
        )
    return best


def recovered(run: Run, runs: Sequence[Run]) -> float | None:
    """(rounded - method) / (rounded - before), all losses.

    None for a run of rtn, where there is no finite one of rtn with the same bits, quantizer and
    scales, and where that one adds no loss.
    """
    rounded = [
        one.loss_after
        for one in runs
        if one.method == "rtn" and one[1:5] == run[1:5] and one.loss_before == run.loss_before
    ]
    if run.method == "rtn" or not rounded or not rounded[0] > run.loss_before:
        return None
    share = (rounded[0] - run.loss_after) / (rounded[0] - run.loss_before)
    return share if math.isfinite(share) else None


def _named(run: Run) -> str:
    return f"{run.method} with {run.bits:g} bits"


def _layout(run: Run) -> str:
    if run.granularity == "group":
        return f"{run.quantizer} in groups of {run.group_size:,}"
    return f"{run.quantizer} with a scale for each {run.granularity}"


def _table(runs: Sequence[Run]) -> Table:
    head = ["method", "bits", "quantizer", "scales", "before", "after", "added", "recovered"]
    head += ["bits/byte", "file, bytes", "bits a weight", "seconds"]
    rows = []
    for run in runs:
        share = recovered(run, runs)
        rows.append(
            [
                run.method,
                f"{run.bits:g}",
                run.quantizer,
                run.granularity + f" of {run.group_size}" * (run.granularity == "group"),
                f"{run.loss_before:.4f}",
                f"{run.loss_after:.4f}",
                f"{run.loss_added:+.4f}",
                "" if share is None else f"{share:.0%}",
                f"{run.bits_per_byte:.4f}",
                f"{run.file_bytes:,}",
                f"{run.bits_per_weight:.2f}",
                "" if math.isnan(run.seconds) else f"{run.seconds:,.1f}",
            ]
        )
    return Table(head, rows)


def _loss_figure(runs: Sequence[Run]) -> list[Figure]:
    """One line for each method; methods with several quantizers or layouts have one for each."""
    shown: dict[tuple, list[Run]] = {}
    for run in runs:
        if math.isfinite(run.loss_added) and math.isfinite(run.bits_per_weight):
            shown.setdefault((run.method, *run[2:5]), []).append(run)
    if sum(map(len, shown.values())) < 2:
        return []
    layouts = {key[1:] for key in shown}
    lines = []
    for (method, *_), found in shown.items():
        found = sorted(found, key=lambda run: (run.bits_per_weight, run.loss_after))
        lines.append(
            charts.Line(
                method if len(layouts) == 1 else f"{method}, {_layout(found[0])}",
                [(run.bits_per_weight, run.loss_added) for run in found],
                [
                    f"{_named(run)}: {run.loss_added:+.4f} nats, {run.bits_per_weight:.2f} bits a "
                    "weight"
                    for run in found
                ],
            )
        )
    svg = charts.lines(lines, "bits a weight in the file", "loss added, nats a token")
    return [Figure(svg, "What each method adds to the loss by the size of its file; low is good.")]


def _errors(matrices: Sequence[Matrix]) -> list[Block]:
    columns = max(len(matrix.layers) for matrix in matrices)
    rows = [
        charts.HeatRow(
            _short(matrix),
            [layer.error for layer in matrix.layers],
            [f"{_place(matrix, layer)}: error {layer.error:.3g}" for layer in matrix.layers],
        )
        for matrix in matrices
    ]
    head = ["matrix", "layer", "bits", "error", "outermost codes", "largest weight, rms"]
    head += ["beyond 6 rms", "code bytes", "scale bytes", "bits a weight"]
    numbers = [
        [
            _short(matrix),
            "" if layer.index is None else str(layer.index),
            f"{layer.bits:g}",
            f"{layer.error:.4g}",
            f"{layer.outermost:.2%}",
            f"{layer.outlier:.1f}",
            f"{layer.beyond:,}",
            f"{layer.size.codes:,}",
            f"{layer.size.scales:,}",
            f"{layer.size.bits_per_weight:.2f}",
        ]
        for matrix in matrices
        for layer in matrix.layers
    ]
    caption = (
        "Relative squared error |W - Q|² / |W|² of each quantized matrix W, of which Q is on the "
        "grid. A matrix outside of the layers is as wide as all of them."
    )
    return [
        Figure(charts.heat_map(rows, columns, "layer", "relative squared error"), caption),
        Details("All numbers, by matrix and layer", [Table(head, numbers)]),
    ]


def _distribution(matrix: Matrix) -> Figure:
    layers = matrix.layers
    edges = layers[0].weights.edges / layers[0].rms
    counts = sum(layer.weights.counts for layer in layers)
    scales = sum(layer.scales.counts for layer in layers)
    values, used = _codes(matrix)
    worst = max(layers, key=lambda layer: layer.error)
    count = sum(layer.size.parameters for layer in layers)
    outermost = sum(layer.outermost * layer.size.parameters for layer in layers) / count
    error = f"{worst.error:.3g}"
    if worst.index is not None and len(layers) > 1:
        error = f"at most {error} (layer {worst.index})"
    widths = sorted({layer.bits for layer in layers})
    caption = (
        f"{matrix.path}: {' and '.join(f'{bits:g}' for bits in widths)} bits, error {error}, "
        f"{outermost:.2%} at the outermost codes, largest weight "
        f"{max(layer.outlier for layer in layers):.1f} rms, "
        f"{sum(layer.beyond for layer in layers):,} weights beyond {edges[-1]:g} rms"
    )
    svg = charts.weights_and_codes(edges, counts, values, used, "rms")
    return Figure(svg + charts.histogram(layers[0].scales.edges, scales, "log2 of scales"), caption)


def _codes(matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean value in rms, and count, of every code over the layers; of every width for itself."""
    values, used = [], []
    for bits in sorted({layer.bits for layer in matrix.layers}):
        layers = [layer for layer in matrix.layers if layer.bits == bits]
        counts = np.stack([layer.code_counts for layer in layers])
        means = np.stack([layer.code_means / layer.rms for layer in layers])
        total = counts.sum(0)
        sums = np.where(counts > 0, means * counts, 0).sum(0)
        values.append(np.divide(sums, total, out=np.full(len(total), np.nan), where=total > 0))
        used.append(total)
    return np.concatenate(values), np.concatenate(used)


def _bytes(description: Description) -> Table:
    head = ["", "weights", "bytes before", "codes", "scales", "exact zeros", "kept", "bytes after"]
    head += ["bits a weight", "share of bytes"]

    def row(name: str, size: Size) -> list[str]:
        share = size.after / max(description.total.after, 1)
        sizes = (*size, size.after)
        return [name, *(f"{n:,}" for n in sizes), f"{size.bits_per_weight:.2f}", f"{share:.1%}"]

    found = [
        row(_NAMES[kind], size) for kind, size in description.groups.items() if size.parameters
    ]
    return Table(head, [*found, row("all", description.total)])


def _short(matrix: Matrix) -> str:
    return matrix.path.removeprefix(f"{LAYERS}/")


def _place(matrix: Matrix, layer: Layer) -> str:
    return matrix.path if layer.index is None else f"{_short(matrix)} of layer {layer.index}"
