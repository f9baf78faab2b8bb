"""What tasks gave: a table and a page for people, JSON for programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command, document
from launch.document import Details, Heading, Paragraph, Table
from lm import strict_json
from lm.errors import InputError, shown, writing
from lm.evaluation.tasks.evaluate import Outcome

FORMAT = 1

_HEAD = ("task", "metric", "value", "standard error", "items")

# Items of a task on the page.
_SHOWN = 200


def check_output(flag: str, path: str) -> None:
    """Refuses a file that cannot be written, before anything is computed.

    Raises:
      InputError: its folder does not exist, or it is a folder.
    """
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise InputError(f"--{flag}={path} must be a file in a folder that exists")


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """One line a metric: its task, value, standard error and number of items."""
    lines = command.table(_HEAD, _rows(outcomes))
    for outcome in outcomes:
        if outcome.cut:
            lines.append(_of_cut(outcome))
    return lines


def _rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    return [
        [
            outcome.task.name,
            figure.metric,
            f"{figure.value:.4f}",
            "" if figure.standard_error is None else f"{figure.standard_error:.4f}",
            f"{figure.items:,}",
        ]
        for outcome in outcomes
        for figure in outcome.figures
    ]


def _of_cut(outcome: Outcome) -> str:
    return (
        f"{outcome.task.name}: {outcome.cut:,} items are too long for the model and lost their "
        "beginnings"
    )


def write_page(path: str, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Writes a page of HTML with the table, and below it the items of every task."""
    described = ", ".join(f"{name} {value}" for name, value in about.items())
    blocks = [
        Paragraph(f"{described}. The standard error is that of a mean over items."),
        Table(_HEAD, _rows(outcomes)),
        *(Paragraph(_of_cut(outcome)) for outcome in outcomes if outcome.cut),
        Heading("Items"),
        *map(_items, outcomes),
    ]
    with writing(path):
        command.write_text(Path(path), document.page(blocks, f"Tasks: {about['model']}"))


def _items(outcome: Outcome) -> Details:
    """The first items of a task; what is a list is written in one cell."""
    items = outcome.items[:_SHOWN]
    names = [name for name in items[0] if name != "index"]
    rows = [
        [
            shown(outcome.task.documents[item["index"]], 120),
            *(_cell(item[name]) for name in names),
        ]
        for item in items
    ]
    summary = f"{outcome.task.name}: {len(items):,} of {len(outcome.items):,} items"
    return Details(summary, [Table(["item", *names], rows)])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:.3f}" if isinstance(value, float) else shown(str(value), 120)


def write(path: str, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Writes a file of JSON with the figures and items of every task."""
    content = {
        "format": FORMAT,
        **about,
        "tasks": {outcome.task.name: _described(outcome) for outcome in outcomes},
    }
    with writing(path):
        command.write_text(Path(path), strict_json.dumps(content, indent=1) + "\n")


def _described(outcome: Outcome) -> dict[str, Any]:
    task = outcome.task
    return {
        "file": task.file,
        "output_type": task.output_type,
        "num_fewshot": task.shots.count,
        "cut": outcome.cut,
        "metrics": {
            figure.metric: {
                "value": figure.value,
                "standard_error": figure.standard_error,
                "items": figure.items,
            }
            for figure in outcome.figures
        },
        "items": [_scored(outcome, item) for item in outcome.items],
    }


def _scored(outcome: Outcome, item: Mapping[str, Any]) -> dict[str, Any]:
    """An item with an `id`, and with a `score` that launch.compare reads.

    That is its part of the first metric, or its log-likelihood where that is no mean over items.
    """
    metric = outcome.figures[0].metric
    score = item[metric] if metric in item else item["log_likelihood"]
    rest = {name: value for name, value in item.items() if name != "index"}
    return {"id": item["index"], "score": score, **rest}
