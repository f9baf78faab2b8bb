"""Tasks that are evaluated while a model is trained."""

from collections.abc import Callable
from typing import Any

from lm.data.tokenizers import Tokenizer
from lm.evaluation.tasks.evaluate import check, evaluate
from lm.evaluation.tasks.model import Programs, encoder_of
from lm.evaluation.tasks.task import read_tasks
from lm.model.trained import Trained
from lm.training.experiment import Experiment


class TaskEvaluation:
    """(trained, quantized, between) -> figures by name, as task/metric.

    Compiled once in each phase. `between` is called before each batch.

    Args:
      built: the run.
      tokenizer: of its text.
      files: of the tasks.

    Raises:
      InputError: a file or a document is not valid, or two tasks have one name.
    """

    def __init__(self, built: Experiment, tokenizer: Tokenizer, files: list[str]):
        self._built = built
        self._tasks = read_tasks(files, "evaluation.tasks")
        self._encoder = encoder_of(built, tokenizer, trained_here=True)
        for task in self._tasks:
            check(task, self._encoder)
        self._programs: dict[bool, Programs] = {}

    def __call__(
        self, trained: Trained, quantized: bool, between: Callable[[], Any]
    ) -> dict[str, float]:
        """Evaluates all of them; all processes have to ask."""
        if quantized not in self._programs:
            on_grid = self._built.quantized if quantized else None
            self._programs = {quantized: Programs(self._built, on_grid, self._encoder)}
        machine = self._programs[quantized].machine(trained, between)
        return {
            f"{task.name}/{figure.metric}": figure.value
            for task in self._tasks
            for figure in evaluate(task, machine).figures
        }


def task_evaluation(built: Experiment, tokenizer: Tokenizer) -> TaskEvaluation | None:
    """Of the files that evaluation.tasks names; None where there are none.

    Raises:
      InputError: see `TaskEvaluation`.
    """
    names = built.config.evaluation.tasks.split(",")
    files = [name.strip() for name in names if name.strip()]
    return TaskEvaluation(built, tokenizer, files) if files else None
