"""Prompts of a task: description, examples and question, as lm_eval 0.4.13 builds them."""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from lm.errors import InputError, shown
from lm.evaluation.tasks.task import Task

# lm_eval's, for the draws of examples; they go on from one document to the next.
_SEED = 1234


class Prompt(NamedTuple):
    """What is asked of a document.

    Attributes:
      document: itself.
      context: that the answer follows; "" where the choices are contexts.
      choices: the texts to choose from; () without doc_to_choice.
      contexts: one for each choice, where doc_to_text gives the index of the right one; else ().
      target: of the document: the answer to that, or the right choice.
    """

    document: dict[str, Any]
    context: str
    choices: tuple[str, ...]
    contexts: tuple[str, ...]
    target: Any


def prompts(task: Task, limit: int | None = None) -> Iterator[Prompt]:
    """Yields the prompts of the first `limit` documents, of all by default.

    Raises:
      InputError: a document lacks what the task takes from it.
    """
    draws = random.Random(_SEED)
    for document in task.documents[:limit]:
        before = task.reader.resolved("description", task.description, document)
        for example in _examples(task, document, draws):
            before += _shown(task, example)
        text = task.reader.text(document)
        choices = tuple(task.reader.choices(document)) if task.reader.has_choices else ()
        target = task.reader.target(document)
        prefix = task.reader.resolved("gen_prefix", task.gen_prefix, document)
        if isinstance(text, int):
            if not choices:
                raise InputError(
                    f"{task.file}: doc_to_text gives {text}, the index of a context, and there is "
                    "no doc_to_choice"
                )
            contexts = tuple(before + _question(one, prefix, "") for one in choices)
            yield Prompt(document, "", choices, contexts, target)
        else:
            context = before + _question(text, prefix, task.target_delimiter)
            yield Prompt(document, context, choices, (), target)


def _question(text: str, prefix: str, delimiter: str) -> str:
    """The question, and what opens the answer."""
    if not prefix:
        return text
    apart = bool(text) and not (text[-1].isspace() or prefix[0].isspace())
    return text + (delimiter if apart else "") + prefix


def _examples(task: Task, document: dict[str, Any], draws: random.Random) -> list[dict[str, Any]]:
    shots, other = task.shots, document if task.shots.of_evaluated else None
    if not shots.count:
        return []
    pool = list(shots.pool)
    if shots.first:
        found = [one for one in pool if one != other][: shots.count]
    elif other is None:
        found = draws.sample(pool, shots.count)
    else:
        drawn = draws.sample(pool, shots.count + 1)
        found = [one for one in drawn if one != other][: shots.count]
        if len(found) < shots.count:
            pool = [one for one in pool if one != other]
            found = draws.sample(pool, shots.count) if len(pool) >= shots.count else []
    if len(found) < shots.count:
        raise InputError(f"{task.file}: num_fewshot={shots.count}: too few examples are different")
    return found


def _shown(task: Task, example: dict[str, Any]) -> str:
    """An example with its answer."""
    text, answer = task.reader.text(example), task.reader.target(example)
    choices = task.reader.choices(example) if task.reader.has_choices else []
    if isinstance(text, int):
        text, choices = _chosen(task, choices, text), []
    if isinstance(answer, int) and choices:
        answer = _chosen(task, choices, answer)
    elif isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, str):
        raise InputError(
            f"{task.file}: doc_to_target gives {shown(answer)}, which an example cannot show; "
            "valid: a text, or the index of a choice"
        )
    prefix = task.reader.resolved("gen_prefix", task.gen_prefix, example)
    if not answer:
        return _question(text, prefix, task.target_delimiter)
    if not prefix:
        return text + task.target_delimiter + answer + task.fewshot_delimiter
    apart = not (prefix[-1].isspace() or answer[0].isspace())
    opened = _question(text, prefix, task.target_delimiter)
    return opened + " " * apart + answer + task.fewshot_delimiter


def _chosen(task: Task, choices: list[str], index: int) -> str:
    if not 0 <= index < len(choices):
        raise InputError(
            f"{task.file}: {index} is the index of no choice of an example, of which there are "
            f"{len(choices)}"
        )
    return choices[index]
