"""The outcomes of an ablation: how far its runs are, their results, and comparisons of them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm.studies import comparison, sequential
from lm.studies.ablation import Ablation
from lm.studies.ablation_runs import Run
from lm.training.logging import read_metrics


class Progress(NamedTuple):
    """How far a run is, from its metrics.jsonl.

    Attributes:
      step: the last one written down.
      train_loss: there; None before the first line.
      curve: (step, loss) of all evaluations.
      result: the line of the last evaluation of the whole split, when the run has ended with it.
      tokens_per_second: total over the written steps, compilation, evaluation and saving not
        counted; None where unknown.
    """

    step: int
    train_loss: float | None
    curve: tuple[tuple[int, float], ...]
    result: dict[str, Any] | None
    tokens_per_second: float | None


def progress(folder: Path, steps: int) -> Progress:
    """Reads the metrics.jsonl of a run; zero and None where there is none."""
    return progress_of(read_metrics(folder), steps)


def progress_of(lines: Sequence[Mapping[str, Any]], steps: int) -> Progress:
    """How far a run of `steps` steps is, from the lines of its metrics.jsonl."""
    trained = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] == "validation"]
    result = next((v for v in reversed(evaluated) if v["whole"] and v["step"] >= steps), None)
    return Progress(
        max((line["step"] for line in lines), default=0),
        trained[-1]["loss"] if trained else None,
        tuple((line["step"], line["loss"]) for line in evaluated),
        result,
        rate(lines),
    )


def rate(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens per second over the training lines: their tokens by the time that they took.

    The time of a policy gradient includes that of drawing and judging answers. A line has its rate,
    and as many tokens as lie between it and the line before; after a start from a checkpoint it has
    as many as the others.
    """
    trained = [line for line in lines if line["kind"] == "train"]
    before = [0, *(line["tokens"] for line in trained)]
    counts = [line["tokens"] - b for line, b in zip(trained, before, strict=False)]
    usual = statistics.median(counts) if counts else 0
    tokens = seconds = 0.0
    for line, count in zip(trained, counts, strict=True):
        if line.get("tokens_per_second"):
            asking = line.get("sampling_share", 0.0) + line.get("judging_share", 0.0)
            tokens += min(count, usual)
            seconds += min(count, usual) / line["tokens_per_second"] / (1 - asking)
    return tokens / seconds if seconds else None


class Row(NamedTuple):
    """One run of results.csv.

    Attributes:
      ablation: --config of the ablation, and the changes to it but for the seeds.
      baseline: its baseline.
      match: what is matched.
      confidence: of all intervals together.
      variant: name.
      seed: of initialisation and data order.
      steps: of training.
      tokens: of training, padding included.
      loss: of the whole validation split at the end, nats per token.
      bits_per_byte: of it.
      tokens_per_second: as in `Progress`; nan where unknown.
      parameters: N.
      bits: width of the layers' matrices, 16 in full precision.
      quantized_tokens: tokens of the quantized phase.
      weight_bytes: of the trained weights, codes packed.
      state_bytes: of the train state.
      flops: model FLOPs of the training.
      config_hash: as `Run.digest`.
      metrics: path of its metrics.jsonl in the folder of the ablation.
      planned_seeds: seeds of a study with looks after each of them; 0 for a study without.
      stopped: number of seeds after which the comparison of its variant was stopped; 0 if it was
        not.
    """

    ablation: str
    baseline: str
    match: str
    confidence: float
    variant: str
    seed: int
    steps: int
    tokens: int
    loss: float
    bits_per_byte: float
    tokens_per_second: float
    parameters: int
    bits: float
    quantized_tokens: int
    weight_bytes: int
    state_bytes: int
    flops: float
    config_hash: str
    metrics: str
    planned_seeds: int = 0
    stopped: int = 0


def row(ablation: Ablation, name: str, run: Run, state: Progress) -> Row:
    """The row of a run that has ended; `name` is that of the ablation's file."""
    one = run.planned
    quantized = 0 if one.variant.quantizes else one.tokens - one.switch * one.tokens_per_step
    return Row(
        name,
        ablation.baseline,
        ablation.match,
        ablation.confidence,
        one.variant.name,
        run.seed,
        one.steps,
        one.tokens,
        state.result["loss"],
        state.result["bits_per_byte"],
        math.nan if state.tokens_per_second is None else state.tokens_per_second,
        one.parameters,
        one.bits,
        quantized,
        one.weight_bytes,
        one.state_bytes,
        one.flops,
        run.digest,
        f"{run.name}/metrics.jsonl",
    )


class Outcome(NamedTuple):
    """What the rows of a variant say.

    Attributes:
      variant: name.
      loss: nats per token.
      bits_per_byte: the same, for any tokenizer; what is compared.
      tokens_per_second: mean over seeds, nan where unknown.
      row: that of its first seed, for all that does not depend on it.
      comparison: with the baseline; None for the baseline itself.
    """

    variant: str
    loss: comparison.Summary
    bits_per_byte: comparison.Summary
    tokens_per_second: float
    row: Row
    comparison: comparison.Comparison | None


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """The variants of one ablation, in the order of the rows, compared in bits per byte.

    In a study with looks after every seed the intervals are those of lm.studies.sequential, which
    hold at all looks at once. Between runs with one tokenizer bits per byte are their loss times a
    constant, and between others they are the loss that can be compared. Without runs of the
    baseline nothing is compared.
    """
    by_variant: dict[str, list[Row]] = {}
    for one in rows:
        by_variant.setdefault(one.variant, []).append(one)
    baseline, confidence = rows[0].baseline, rows[0].confidence
    scores = {n: {r.seed: r.bits_per_byte for r in group} for n, group in by_variant.items()}
    others = len(by_variant) - (baseline in by_variant)
    found = []
    for name, group in by_variant.items():
        compared = None
        if name != baseline and baseline in scores:
            pair, bound = (scores[baseline], scores[name]), None
            if planned := rows[0].planned_seeds:
                bounds = sequential.study_bounds(planned, others, confidence)
                bound = bounds.get(len(comparison.paired(*pair)), math.inf)
            compared = comparison.compare(*pair, others, confidence, bound=bound)
        found.append(
            Outcome(
                name,
                comparison.summarise([r.loss for r in group]),
                comparison.summarise([r.bits_per_byte for r in group]),
                statistics.fmean(r.tokens_per_second for r in group),
                group[0],
                compared,
            )
        )
    return found


def in_words(outcome: Outcome) -> str:
    """The verdict on a variant, in a sentence."""
    name, found = outcome.variant, outcome.comparison
    if found is None:
        return f"{name}: the baseline" if name == outcome.row.baseline else f"{name}: not compared"
    if not found.seeds:
        return f"{name}: no seed that the baseline has, too"
    if found.seeds == 1:
        return (
            f"{name}: {found.difference:+.4f} bits/byte at one seed, with which nothing can be "
            "resolved"
        )
    interval = f"{found.difference:+.4f} bits/byte ({found.low:+.4f} to {found.high:+.4f})"
    if stop := outcome.row.stopped:
        looked = f"stopped at the look after {stop} of {outcome.row.planned_seeds} seeds"
        return f"{name}: {found.verdict}, {interval}, {looked}"
    if found.verdict != "not resolved":
        return f"{name}: {found.verdict}, {interval}"
    if found.seeds_needed is None:
        needed = "no number of seeds would resolve a difference of nothing"
    else:
        needed = f"about {found.seeds_needed:,} seeds would resolve a difference of this size"
    return f"{name}: not resolved at {found.seeds} seeds, {interval}; {needed}"
