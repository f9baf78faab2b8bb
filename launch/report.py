"""The report of an ablation: report.md and report.html in its folder."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import command, document, early_stopping, figures, forest_plot, records
from launch.document import Figure, Heading, Items, Paragraph, Table
from lm.studies import ablation, outcomes, sequential
from lm.studies.ablation import Ablation, Planned
from lm.studies.ablation_runs import Run
from lm.studies.outcomes import Outcome, Row

_MATCHED = {
    "tokens": "All variants have the tokens of the baseline.",
    "flops": "All variants have the model FLOPs of the baseline, forward passes of second models "
    "included: train.steps is scaled by the FLOPs of a token.",
    "time": "All variants have the accelerator time of the baseline: train.steps is scaled by the "
    "tokens per second of a short run of each, measured before (the protocol of arXiv 2309.11197).",
    "none": "Nothing is matched: each variant has its own train.steps.",
}


class Written(NamedTuple):
    """Result of `write`: the verdicts, one line each, and the path of the page."""

    summary: str
    page: Path


def write(
    asked: Ablation,
    planned: Mapping[str, Planned],
    runs: Sequence[Run],
    rows: Sequence[Row],
    name: str,
    folder: Path,
) -> Written:
    """Writes the report of the runs that have ended; it names the runs without a result.

    Args:
      asked: the ablation.
      planned: its variants.
      runs: all runs.
      rows: results of the compared runs that have ended.
      name: the config file of the ablation and the changes to it, for the title and the command.
      folder: the report's folder.
    """
    found = outcomes.outcomes(rows)
    summary = verdicts(found)
    stops = early_stopping.stops(rows)
    missing = [
        run.name
        for run in early_stopping.planned(asked, runs, stops)
        if run.planned.variant.compared and not records.is_done(run)
    ]
    blocks = [
        Paragraph(_what(asked, name)),
        *[Paragraph(f"Without a result, and not in here: {', '.join(missing)}.")] * bool(missing),
        Items(summary),
        *([_difference_figure(rows, found)] if _has_pairs(found) else []),
        table(found),
        Paragraph(how_to_read(found)),
        Heading("Cost"),
        costs(found),
        Heading("During training"),
        *_curve_figures(runs, asked),
        Heading("Differences between the configs"),
        _config_items(planned, asked.baseline),
        *_pairing_notes(planned, asked),
    ]
    title = f"Ablation {Path(name.split()[0].partition(':')[0]).stem}"
    command.write_text(folder / "report.md", document.markdown(blocks, title))
    command.write_text(folder / "report.html", document.page(blocks, title))
    return Written("\n".join(summary), folder / "report.html")


def verdicts(found: Sequence[Outcome]) -> list[str]:
    """Returns one sentence for each variant except the baseline."""
    return [outcomes.in_words(one) for one in found if one.variant != one.row.baseline]


def table(found: Sequence[Outcome]) -> Table:
    """Returns the table of losses, differences to the baseline with intervals, and verdicts."""
    head = [
        "variant",
        "loss, nats/token",
        "bits/byte",
        "seeds",
        "difference, bits/byte",
        f"{found[0].row.confidence:.0%} interval",
        "verdict",
        "seeds to resolve",
    ]
    rows = []
    for one in found:
        c, cells = one.comparison, ["", "", "baseline", ""]
        if c is not None and c.seeds:
            interval = f"{c.low:+.4f} to {c.high:+.4f}" if math.isfinite(c.low) else "unbounded"
            needed = f"{c.seeds_needed:,}" if c.seeds_needed else ""
            verdict = c.verdict
            if one.row.stopped:
                verdict += f", stopped after {one.row.stopped} of {one.row.planned_seeds}"
                needed = ""
            cells = [f"{c.difference:+.4f}", interval, verdict, needed]
        elif one.variant != one.row.baseline:
            cells = ["", "", "not compared", ""]
        loss, bits = (_with_error(s) for s in (one.loss, one.bits_per_byte))
        rows.append([one.variant, loss, bits, str(one.loss.seeds), *cells])
    return Table(head, rows)


def costs(found: Sequence[Outcome]) -> Table:
    """Returns the table of parameters, tokens, FLOPs, speed and bytes of each variant."""
    head = ["variant", "parameters", "steps", "tokens", "model FLOPs", "tokens/s", "bits"]
    head += ["bytes of the weights", "bytes of the train state"]
    return Table(
        head,
        [
            [
                one.variant,
                f"{one.row.parameters:,}",
                f"{one.row.steps:,}",
                f"{one.row.tokens:,}",
                f"{one.row.flops:.4g}",
                "" if math.isnan(one.tokens_per_second) else f"{one.tokens_per_second:,.0f}",
                f"{one.row.bits:g}",
                f"{one.row.weight_bytes:,}",
                f"{one.row.state_bytes:,}",
            ]
            for one in found
        ],
    )


def how_to_read(found: Sequence[Outcome]) -> str:
    """Returns a paragraph that explains the losses and intervals of `table`."""
    count = sum(one.comparison is not None for one in found)
    confidence = found[0].row.confidence
    text = (
        "Of the whole validation split at the end of training; ± is one standard error over seeds. "
        "Runs of one seed have the same initialisation and order of data, so differences are taken "
        f"seed by seed. Intervals are Student's t of these, at {1 - (1 - confidence) / count:.2%} "
        f"each (Bonferroni for {count} comparison{'s' * (count > 1)}), so that all of them hold "
        f"the true differences with {confidence:.0%}; they take differences to be normal. Seeds to "
        "resolve: the number that gives an interval without 0 with a probability of 80% if the "
        "true difference and deviation are those observed; with few seeds it is a rough estimate."
    )
    if planned := found[0].row.planned_seeds:
        text += (
            f" The {planned} seeds were looked at one by one, and the intervals hold at all looks "
            "at once (lm/studies/sequential.py); they are wider than without looks. A comparison "
            "stops when it is worse, or from half of the seeds on when the trend would resolve it "
            f"with a probability below {sequential.FUTILITY:.0%}."
        )
    if max(one.loss.seeds for one in found) < 2:
        text = (
            "One seed: nothing can be resolved, since the variation between seeds is not known. "
            + text
        )
    return text if count else "There is no run of the baseline to compare with."


def _what(asked: Ablation, name: str) -> str:
    seeds = ", ".join(map(str, asked.seeds))
    return (
        f"`python -m launch.ablate --config={name}`, seeds {seeds}; the baseline is "
        f"{asked.baseline}. {_MATCHED[asked.match]}"
    )


def _with_error(summary: Any) -> str:
    error = "" if math.isnan(summary.standard_error) else f" ± {summary.standard_error:.4f}"
    return f"{summary.mean:.4f}{error}"


def _has_pairs(found: Sequence[Outcome]) -> bool:
    return any(one.comparison and one.comparison.seeds for one in found)


def _difference_figure(rows: Sequence[Row], found: Sequence[Outcome]) -> Figure:
    scores = {(row.variant, row.seed): row.bits_per_byte for row in rows}
    effects = []
    for one in found:
        if one.comparison and one.comparison.seeds:
            seeds = [
                score - scores[one.row.baseline, seed]
                for (variant, seed), score in scores.items()
                if variant == one.variant and (one.row.baseline, seed) in scores
            ]
            effects.append(forest_plot.effect(one, seeds))
    told = (
        "Differences to the baseline, left is better: the mean, the interval of the comparison "
        "alone (thick) and corrected for all comparisons (thin), and each seed as a tick."
    )
    panel = forest_plot.Panel("bits per byte minus the baseline's", effects)
    return Figure(forest_plot.svg([panel], "Differences to the baseline", told), told)


def _curve_figures(runs: Sequence[Run], asked: Ablation) -> list[Figure]:
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for run in runs:
        one, points = run.planned, records.progress(run).curve
        if one.variant.compared and not one.variant.quantizes and points:
            scaled = [(step * one.tokens_per_step, loss) for step, loss in points]
            curves.setdefault(one.variant.name, {})[run.seed] = scaled
    if not curves:
        return []
    shown = [
        Figure(
            figures.curves(
                curves, "tokens", "validation loss, nats per token", "curves", [*curves]
            ),
            "Validation loss, mean over seeds and one standard error. The evaluations before the "
            "last one may use a part of the split (evaluation.batches), the same part for all.",
        )
    ]
    relative = _relative(curves, curves.get(asked.baseline, {}))
    if any(len(points) > 1 for by_seed in relative.values() for points in by_seed.values()):
        shown.append(
            Figure(
                figures.curves(
                    relative, "tokens", "loss minus the baseline's, nats", "relative", [*curves]
                ),
                "The same as paired differences, at token counts where both were evaluated. "
                "The intervals above are for one comparison, at the end. Comparing at many "
                "points makes a false difference more likely.",
            )
        )
    return shown


def _relative(curves: Any, baseline: Any) -> dict[str, dict[int, list[tuple[float, float]]]]:
    relative = {}
    for variant, by_seed in curves.items():
        if by_seed is baseline:
            continue
        relative[variant] = {}
        for seed in by_seed.keys() & baseline.keys():
            ours = dict(baseline[seed])
            relative[variant][seed] = [(x, y - ours[x]) for x, y in by_seed[seed] if x in ours]
    return relative


def _config_items(planned: Mapping[str, Planned], baseline: str) -> Items:
    found = ablation.differences(planned, baseline)
    texts = []
    for name in planned:
        changes = [f"`{key}={value}`" for key, value in found[name].items()]
        mark = ", the baseline" * (name == baseline)
        mark += ", not compared" * (not planned[name].variant.compared)
        texts.append(f"{name}{mark}: {', '.join(changes) or 'as the baseline'}")
    return Items(texts)


def _pairing_notes(planned: Mapping[str, Planned], asked: Ablation) -> list[Paragraph]:
    decisive = ("data.", "train.batch_size", "train.accumulation")
    found = ablation.differences(planned, asked.baseline)
    other = [
        name
        for name, keys in found.items()
        if planned[name].variant.compared and any(key.startswith(decisive) for key in keys)
    ]
    if not other:
        return []
    return [
        Paragraph(
            f"These variants see the data in another order than the baseline: {', '.join(other)}. "
            "Their differences are paired by initialisation only."
        )
    ]
