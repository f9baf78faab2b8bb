"""The tables that programs of benchmarks/ print, as functions of the metrics of their runs.

A program prints its table and, with --collect, writes it to docs/results as NAME.printed.csv, with
the metrics of the runs beside it, so that `launch.results --trace` can make it again from these.
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command
from lm.studies import power, raw_runs
from lm.studies.comparison import summarise

PRINTED = ".printed.csv"

Lines = Sequence[Mapping[str, Any]]
Runs = Mapping[tuple[str, int], Lines]
Rows = list[list[str]]  # the first one names the columns


def interval(values: Sequence[float], form: str = ".4f") -> str:
    """Mean and half the width of its 95% interval (Student's t); the mean alone for one seed.

    Args:
      values: one of each seed.
      form: format of the mean; half the width has no sign.
    """
    found = summarise(values)
    if found.seeds < 2:
        return f"{found.mean:{form}}"
    half = power.critical(found.seeds, 1) * found.standard_error
    return f"{found.mean:{form}} ± {0.0 if math.isnan(half) else half:{form.lstrip('+')}}"


def policy_grpo(runs: Runs, steps: Sequence[int] = (600, 1200, 1800)) -> Rows:
    """Share of held-out sums that are solved during a run of GRPO, by seed.

    Args:
      runs: of "sums", what is begun with, and of "grpo".
      steps: of the columns; the last one is compared with what was begun with.
    """
    head = ["seed", "before", *(f"{step:,} steps" for step in steps), "gained"]
    rows, values = [head], []
    for seed in _seeds(runs, "sums"):
        found = [_last(runs["sums", seed], "validation")["solved"]]
        lines = runs["grpo", seed]
        found += [_last(lines, "validation", step)["solved"] for step in steps]
        values.append([*found, found[-1] - found[0]])
        *shares, gain = values[-1]
        rows.append([str(seed), *(f"{share:.3f}" for share in shares), f"{gain:+.3f}"])
    *columns, gains = zip(*values, strict=True)
    rows.append(["mean", *(interval(column, ".3f") for column in columns), interval(gains, "+.3f")])
    return rows


def policy_methods(runs: Runs) -> Rows:
    """Policy gradients from the same models, by method.

    Columns: share of held-out sums that are solved greedily at the end; the same minus that of the
    model begun with, and minus that of the first method; share of the answers that are right in the
    last logged step; thousands of tokens drawn for training, those drawn while compiling left out.

    Args:
      runs: of "sums", what is begun with, and of the methods in the order of the rows.
    """
    names = list(dict.fromkeys(name for name, _ in runs if name != "sums"))
    seeds = _seeds(runs, "sums")

    def solved(name: str) -> list[float]:
        return [_last(runs[name, seed], "validation")["solved"] for seed in seeds]

    before, first = solved("sums"), solved(names[0])
    rows = [["method", "solved", "gained", f"to {names[0]}", "solved, drawn", "drawn tokens"]]
    rows.append(["before", interval(before, ".3f"), "", "", "", ""])
    for name in names:
        ours = solved(name)
        right = [_last(runs[name, seed], "train")["solved"] for seed in seeds]
        tokens = [_drawn(runs[name, seed]) / 1000 for seed in seeds]
        rows.append(
            [
                name,
                interval(ours, ".3f"),
                interval(_minus(ours, before), "+.3f"),
                "" if name == names[0] else interval(_minus(ours, first), "+.3f"),
                interval(right, ".3f"),
                f"{sum(tokens) / len(tokens):.0f}",
            ]
        )
    return rows


def preference(runs: Runs) -> Rows:
    """Preference objectives on held-out pairs, by objective.

    Before training every margin is a tie and the accuracy 0.5; "gained" is the accuracy minus this.
    KL(base, model) is in nats a token of the answers, from a line of kind "measured".

    Args:
      runs: of the objectives in the order of the rows.
    """
    keys = {
        "margin": "margin",
        "log p, chosen": "log_probability_chosen",
        "log p, rejected": "log_probability_rejected",
    }
    rows = [["objective", "held-out accuracy", "gained", *keys, "KL(base, model)"]]
    for name in dict.fromkeys(name for name, _ in runs):
        lines = [runs[name, seed] for seed in _seeds(runs, name)]
        ends = [_last(one, "validation") for one in lines]
        accuracy = [end["accuracy"] for end in ends]
        divergence = [_last(one, "measured")["reference_kl"] for one in lines]
        rows.append(
            [
                name,
                interval(accuracy),
                interval([one - 0.5 for one in accuracy], "+.4f"),
                *(interval([end[key] for end in ends]) for key in keys.values()),
                interval(divergence),
            ]
        )
    return rows


def finetuning(runs: Runs) -> Rows:
    """Weightings in fine-tuning, by method, compared seed by seed with the first one.

    Columns: loss on the held-out answers, bits per byte; that of the first method minus it; share
    of the tokens of these answers that the model ranks first; the same minus that of the first
    method; loss on general text, bits per byte; the same minus that of the model begun with; and
    how much less that is than for the first method.

    Args:
      runs: of "before", what is begun with, and of the methods in the order of the rows; each with
        a line of kind "measured".
    """
    names = list(dict.fromkeys(name for name, _ in runs))
    seeds = _seeds(runs, "before")

    def values(name: str, key: str) -> list[float]:
        return [_last(runs[name, seed], "measured")[key] for seed in seeds]

    keys = ("answers", "right", "general")
    before, ours = ({key: values(name, key) for key in keys} for name in names[:2])
    head = ["method", "answers", "better by", "ranked first", "more first"]
    rows = [[*head, "general text", "forgotten", "forgotten less", "seeds"]]
    for name in names:
        answers, right, general = (values(name, key) for key in keys)
        gains = [
            interval(_minus(ours["answers"], answers), "+.4f"),
            interval(_minus(right, ours["right"]), "+.4f"),
            interval(_minus(ours["general"], general), "+.4f"),
        ]
        better, more, less = gains if name in names[2:] else ("", "", "")
        lost = "" if name == "before" else interval(_minus(general, before["general"]), "+.4f")
        shown = [interval(answers), better, interval(right), more, interval(general), lost, less]
        rows.append([name, *shown, str(len(seeds))])
    return rows


TABLES: dict[str, Callable[[Runs], Rows]] = {
    "finetuning_clean": finetuning,
    "finetuning_corrupted": finetuning,
    "policy_grpo": policy_grpo,
    "policy_methods": policy_methods,
    "policy_quantized": policy_methods,
    "preference": preference,
}


def collect(name: str, runs: Runs, folder: Path) -> Path:
    """Writes the table of runs to a folder, and their metrics beside it.

    Args:
      name: of the table, in TABLES.
      runs: what it is made of.
      folder: docs/results.

    Returns:
      The path of the table.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(TABLES[name](runs))
    path = folder / f"{name}{PRINTED}"
    command.write_bytes(folder / f"{name}{raw_runs.SUFFIX}", raw_runs.encode(runs))
    command.write_text(path, text.getvalue())
    return path


def _seeds(runs: Runs, name: str) -> list[int]:
    return [seed for variant, seed in runs if variant == name]


def _last(lines: Lines, kind: str, step: int | None = None) -> Mapping[str, Any]:
    """The last line of a kind, of a step if there is one."""
    return [one for one in lines if one["kind"] == kind and step in (None, one["step"])][-1]


def _drawn(lines: Lines) -> float:
    """Tokens of the answers; none in a line that has no time of drawing."""
    keys = ("sampling_seconds", "sampled_tokens_per_second")
    return sum(math.prod(one.get(key, 0.0) for key in keys) for one in lines)


def _minus(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]
