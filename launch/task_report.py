"""What tasks gave: a table for people, JSON for programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command
from lm import strict_json
from lm.errors import InputError, writing
from lm.evaluation.tasks.evaluate import Outcome

FORMAT = 1


def check_output(path: str) -> None:
    """Refuses a file that cannot be written, before anything is computed.

    Raises:
      InputError: its folder does not exist, or it is a folder.
    """
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise InputError(f"--tasks_output={path} must be a file in a folder that exists")


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """One line a metric: its task, value, standard error and number of items."""
    rows = [
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
    lines = command.table(["task", "metric", "value", "standard error", "items"], rows)
    for outcome in outcomes:
        if outcome.cut:
            lines.append(
                f"{outcome.task.name}: {outcome.cut:,} items are too long for the model and lost "
                "their beginnings"
            )
    return lines


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
        "items": len(outcome.items),
        "cut": outcome.cut,
        "metrics": {
            figure.metric: {
                "value": figure.value,
                "standard_error": figure.standard_error,
                "items": figure.items,
            }
            for figure in outcome.figures
        },
        "records": outcome.items,
    }
