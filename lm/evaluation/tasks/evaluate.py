"""From a task and a model to figures, and what each item gave."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.errors import InputError, shown
from lm.evaluation.tasks import figures
from lm.evaluation.tasks.answers import matches
from lm.evaluation.tasks.encoding import Encoder
from lm.evaluation.tasks.figures import Figure
from lm.evaluation.tasks.prompts import Prompt, prompts
from lm.evaluation.tasks.scoring import Scored
from lm.evaluation.tasks.task import GENERATE, LOGLIKELIHOOD, MULTIPLE_CHOICE, Task
from lm.evaluation.tasks.writing import Asked


class Outcome(NamedTuple):
    """What a model gave on a task.

    Attributes:
      task: the task.
      figures: its metrics.
      items: one a document: its index, what the model gave, and whether that counts as right.
      cut: items of which the context was too long for the model and lost its beginning.
    """

    task: Task
    figures: list[Figure]
    items: list[dict[str, Any]]
    cut: int


class Machine(NamedTuple):
    """What a model can be asked; `lm.evaluation.tasks.model` makes it.

    Attributes:
      encoder: of its text.
      score: (ids, greedy) -> `Scored` of each.
      write: (asked) -> the answer to each.
    """

    encoder: Encoder
    score: Callable[..., list[Scored]]
    write: Callable[[Sequence[Asked]], list[str]]


def evaluate(task: Task, machine: Machine, limit: int | None = None) -> Outcome:
    """Asks a model the first `limit` documents of a task, all by default.

    Raises:
      InputError: a document lacks what the task takes from it, or does not fit into the model.
    """
    asked = list(prompts(task, limit))
    try:
        if task.output_type == MULTIPLE_CHOICE:
            return _choose(task, asked, machine)
        if task.output_type == LOGLIKELIHOOD:
            return _continue(task, asked, machine)
        if task.output_type == GENERATE:
            return _write(task, asked, machine)
        return _read(task, asked, machine)
    except InputError as error:
        known = str(error).startswith(task.file)
        raise error if known else InputError(f"{task.file}: {error}") from None


def check(task: Task, encoder: Encoder, limit: int | None = None) -> None:
    """Builds and encodes everything that `evaluate` would ask, and asks nothing.

    Raises:
      InputError: see `evaluate`.
    """

    def score(texts, greedy):
        return [Scored(np.zeros(text.scored, np.float32), False) for text in texts]

    evaluate(task, Machine(encoder, score, lambda asked: [""] * len(asked)), limit)


def _choose(task: Task, asked: Sequence[Prompt], machine: Machine) -> Outcome:
    """Multiple choice: the choice with the largest log-likelihood, as it is or by its size."""
    pairs = [_pairs(task, prompt) for prompt in asked]
    flat = [pair for of_one in pairs for pair in of_one]
    encoded = [machine.encoder.pair(*pair) for pair in flat]
    scored = iter(machine.score(encoded, False))
    items, accuracies = [], {}
    for index, (prompt, of_one) in enumerate(zip(asked, pairs, strict=True)):
        found = [next(scored) for _ in of_one]
        right = _right(task, prompt)
        totals = np.array([total(one) for one in found])
        tokens = np.array([len(one.log_probabilities) for one in found])
        item = {
            "index": index,
            "right": sorted(right),
            "log_likelihoods": totals.tolist(),
            "tokens": tokens.tolist(),
        }
        for metric, sizes in _sizes(prompt.choices, tokens).items():
            choice = int(np.argmax(totals / sizes))
            item[f"choice_{metric}"] = choice
            item[metric] = int(choice in right)
            accuracies.setdefault(metric, []).append(item[metric])
        items.append(item)
    means = [figures.mean(metric, values) for metric, values in accuracies.items()]
    return Outcome(task, means, items, _count_cut(machine, flat))


def _sizes(choices: Sequence[str], tokens_C: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> what log-likelihoods are divided by: nothing, characters, bytes, tokens.

    Characters and bytes are those of the choice alone, as in lm_eval 0.4.13.
    """
    return {
        "acc": np.ones(len(choices)),
        "acc_norm": np.array([float(len(choice)) for choice in choices]),
        "acc_bytes": np.array([float(len(choice.encode())) for choice in choices]),
        "acc_per_token": tokens_C.astype(np.float64),
    }


def _pairs(task: Task, prompt: Prompt) -> list[tuple[str, str]]:
    """(context, continuation) of each choice."""
    delimiter = task.target_delimiter
    if not prompt.contexts:
        return [(prompt.context, delimiter + choice) for choice in prompt.choices]
    if not isinstance(prompt.target, str) or not prompt.target:
        raise InputError(
            f"{task.file}: doc_to_target gives {shown(prompt.target)}; after contexts to choose "
            "from it must be a text"
        )
    return [(context, delimiter + prompt.target) for context in prompt.contexts]


def _right(task: Task, prompt: Prompt) -> set[int]:
    """The indices of the choices that count."""
    given = task.reader.text(prompt.document) if prompt.contexts else prompt.target
    found = set()
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str) and one in prompt.choices and not isinstance(given, list):
            found.add(prompt.choices.index(one))
        elif isinstance(one, int) and 0 <= one < len(prompt.choices):
            found.add(int(one))
        else:
            raise InputError(
                f"{task.file}: doc_to_target gives {shown(one)} for "
                f"{shown(prompt.document, 60)}; valid: 0 to {len(prompt.choices) - 1}, or one of "
                "the choices"
            )
    return found


def _continue(task: Task, asked: Sequence[Prompt], machine: Machine) -> Outcome:
    """The log-likelihood of one continuation, and whether the model would write it."""
    pairs = [(prompt.context, _text(task, prompt)) for prompt in asked]
    scored = machine.score([machine.encoder.pair(*pair) for pair in pairs], True)
    items = [
        {
            "index": index,
            "log_likelihood": total(one),
            "tokens": len(one.log_probabilities),
            "acc": int(one.greedy),
        }
        for index, one in enumerate(scored)
    ]
    loss = figures.mean("perplexity", [-item["log_likelihood"] for item in items])
    accuracy = figures.mean("acc", [item["acc"] for item in items])
    found = [figures.exponential(loss), accuracy]
    return Outcome(task, found, items, _count_cut(machine, pairs))


def _read(task: Task, asked: Sequence[Prompt], machine: Machine) -> Outcome:
    """Perplexity of long texts, each read in windows."""
    texts = [_text(task, prompt) for prompt in asked]
    windows = [list(machine.encoder.windows(text, task.stride)) for text in texts]
    scored = iter(machine.score([one for of_text in windows for one in of_text], False))
    items = []
    for index, (text, of_text) in enumerate(zip(texts, windows, strict=True)):
        parts = [next(scored) for _ in of_text]
        items.append(
            {
                "index": index,
                "log_likelihood": sum(map(total, parts)),
                "words": len(re.split(r"\s+", text)),
                "bytes": len(text.encode()),
                "tokens": sum(len(one.log_probabilities) for one in parts),
            }
        )
    nats = [-item["log_likelihood"] for item in items]

    def per(metric: str, unit: str) -> Figure:
        return figures.ratio(metric, nats, [item[unit] for item in items])

    found = [
        figures.exponential(per("word_perplexity", "words")),
        figures.exponential(per("byte_perplexity", "bytes")),
        figures.scaled(per("bits_per_byte", "bytes"), 1 / np.log(2)),
        figures.exponential(per("token_perplexity", "tokens")),
    ]
    return Outcome(task, found, items, 0)


def _write(task: Task, asked: Sequence[Prompt], machine: Machine) -> Outcome:
    """Answers that are written, filtered and compared."""
    encoder, writing = machine.encoder, task.writing
    room = encoder.length - writing.tokens
    if room < 1:
        raise InputError(
            f"generation_kwargs.max_gen_toks={writing.tokens} leaves no room for a prompt in the "
            f"{encoder.length} tokens that the model reads"
        )
    ids = [encoder.prompt(prompt.context) for prompt in asked]
    rows = [Asked(one[-room:], writing.until, writing.tokens) for one in ids]
    written = machine.write(rows)
    items, results = [], {}
    for index, (prompt, answer) in enumerate(zip(asked, written, strict=True)):
        targets = _targets(task, prompt)
        item = {"index": index, "answer": answer, "targets": targets}
        for name, steps in task.filters.items():
            kept = answer
            for step in steps:
                kept = step(kept)
            metric = "exact_match" if name == "none" else f"exact_match,{name}"
            right = any(matches(kept, one, task.matching, task.file) for one in targets)
            item |= {f"filtered,{name}": kept, metric: int(right)}
            results.setdefault(metric, []).append(int(right))
        items.append(item)
    means = [figures.mean(metric, values) for metric, values in results.items()]
    return Outcome(task, means, items, sum(len(one) > room for one in ids))


def _targets(task: Task, prompt: Prompt) -> list[str]:
    """The texts of which one has to be written."""
    given = prompt.target
    if prompt.choices:
        return [prompt.choices[index] for index in sorted(_right(task, prompt))]
    return [str(one) for one in given] if isinstance(given, list) else [str(given)]


def _text(task: Task, prompt: Prompt) -> str:
    if isinstance(prompt.target, str) and prompt.target:
        return prompt.target
    raise InputError(
        f"{task.file}: doc_to_target gives {shown(prompt.target)}; valid: a text that is not empty"
    )


def _count_cut(machine: Machine, pairs: Sequence[tuple[str, str]]) -> int:
    return sum(machine.encoder.is_cut(*pair) for pair in pairs)


def total(scored: Scored) -> float:
    """The log-likelihood of all tokens, summed in float64."""
    return float(np.sum(scored.log_probabilities, dtype=np.float64))
