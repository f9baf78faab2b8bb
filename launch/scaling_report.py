"""Scaling laws fitted to the runs of ablations, as a page: coefficients, bands, held-out runs."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launch import command, document, figures
from launch.document import Figure, Heading, Paragraph, Table
from lm.errors import InputError
from lm.studies import laws
from lm.studies.outcomes import Row
from objectives.quantization import fit_qat_law, qat_law

_CONFIDENCE = 0.9
_QAT_REPEATS = 30


def write(rows: Sequence[Row], held_out: Sequence[str], output: Path) -> str:
    """Writes the page and, beside it, the same as Markdown; returns a summary.

    Full-precision runs are for the laws of size and length, quantized ones for the law of
    quantization-aware training. Held out are the variants named, or else, of each kind, the runs of
    the most FLOPs: what a law is asked for is beyond the runs that it was fitted to.

    Raises:
      InputError: an unknown variant, or runs that determine no law.
    """
    known = {row.variant for row in rows}
    if unknown := [name for name in held_out if name not in known]:
        raise InputError(
            f"--held_out={unknown[0]} is no variant; valid: {', '.join(sorted(known))}"
        )
    plain = [row for row in rows if row.bits >= 16]
    quantized = [row for row in rows if 0 < row.quantized_tokens < row.tokens and row.bits < 16]
    blocks, summary, refused = [], [], []
    for law in laws.LAWS:
        try:
            added, line = _law(law, plain, held_out)
        except ValueError as error:
            refused.append(str(error))
            continue
        blocks += added
        summary.append(line)
    try:
        added, line = _qat(quantized, held_out)
        blocks += added
        summary.append(line)
    except ValueError as error:
        refused.append(f"QAT law: {error}")
    if not summary:
        raise InputError(f"no law can be fitted: {'; '.join(refused)}")
    notes = [Paragraph(f"Not fitted: {'; '.join(refused)}.")] * bool(refused)
    title = "Scaling laws"
    blocks = [Paragraph(_intro(rows)), *blocks, *notes]
    command.write_text(output, document.page(blocks, title))
    command.write_text(output.with_suffix(".md"), document.markdown(blocks, title))
    return "\n".join([*summary, f"page: {output}"])


def _intro(rows: Sequence[Row]) -> str:
    sources = ", ".join(f"`{name}`" for name in dict.fromkeys(row.ablation for row in rows))
    return (
        f"Fitted to {len(rows)} runs of {sources}. N counts all parameters, D all tokens. Bands "
        f"are {_CONFIDENCE:.0%} of fits to runs drawn again with replacement; they do not hold the "
        "error of the form itself, which the held-out runs show."
    )


def _held(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
    if names:
        return np.array([row.variant in names for row in rows], bool)
    return laws.most_flops(rows)


def _law(law: laws.Law, rows: Sequence[Row], names: Sequence[str]):
    if not rows:
        raise ValueError(f"{law.name}: there is no full-precision run")
    runs, held = laws.columns(rows), _held(rows, names)
    found = laws.fit(law, *runs, held_out=held)
    band = laws.bootstrap(found, *runs, held_out=held, confidence=_CONFIDENCE)
    coefficients = [
        [name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*band.coefficients[name])]
        for name, value in found.coefficients.items()
    ]
    line = _errors(law.name, found.error, found.held_out_error, held)
    return [
        Heading(law.name),
        Paragraph(line),
        Table(["coefficient", "value", "band"], coefficients),
        *_shown(law.name, rows, found.predicted, band.low, band.high, held),
    ], line


def _qat(rows: Sequence[Row], names: Sequence[str]):
    if not rows:
        raise ValueError("there is no run with both phases")
    held = _held(rows, names)
    losses = np.array([row.loss for row in rows])
    runs = [
        np.array(values, float)
        for values in (
            [row.parameters for row in rows],
            [row.quantized_tokens for row in rows],
            [row.tokens - row.quantized_tokens for row in rows],
            [row.bits for row in rows],
        )
    ]
    found = fit_qat_law(losses, *runs, held_out=held)
    predicted = qat_law(found.law, *runs)
    rng, fitted, drawn = np.random.default_rng(0), np.flatnonzero(~held), []
    for repeat in range(_QAT_REPEATS):
        chosen = rng.choice(fitted, fitted.size)
        again = fit_qat_law(losses[chosen], *(x[chosen] for x in runs), starts=2, seed=repeat)
        drawn.append(qat_law(again.law, *runs))
    low, high = np.percentile(drawn, [50 * (1 - _CONFIDENCE), 50 * (1 + _CONFIDENCE)], axis=0)
    name = "QAT law (arXiv 2509.22935)"
    relative = np.abs(predicted - losses) / losses
    error = float(relative[held].mean()) if held.any() else math.nan
    line = _errors(name, float(relative[~held].mean()), error, held)
    coefficients = [[key, f"{value:.4g}"] for key, value in found.law._asdict().items()]
    return [
        Heading(name),
        Paragraph(line),
        Table(["coefficient", "value"], coefficients),
        *_shown(name, rows, predicted, low, high, held),
    ], line


def _errors(name: str, error: float, held_out_error: float, held: np.ndarray) -> str:
    return (
        f"{name}: mean relative error {error:.2%} on {int((~held).sum())} runs that it was fitted "
        f"to, {held_out_error:.2%} on {int(held.sum())} that were held out"
    )


def _shown(name, rows, predicted, low, high, held):
    measured = [row.loss for row in rows]
    table = [
        [
            f"{row.variant}, seed {row.seed}",
            f"{row.parameters:,}",
            f"{row.tokens:,}",
            f"{row.loss:.4f}",
            f"{p:.4f}",
            f"{a:.4f} to {b:.4f}",
            "held out" if out else "",
        ]
        for row, p, a, b, out in zip(rows, predicted, low, high, held, strict=True)
    ]
    head = ["run", "N", "D", "loss", "predicted", "band", ""]
    svg = figures.predictions(measured, predicted, low, high, held, name)
    return [Figure(svg, "Predicted against measured, with bands."), Table(head, table)]
