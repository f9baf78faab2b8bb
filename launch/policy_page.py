"""A self-contained HTML page of a rollout: every prompt with the answers that were drawn to it,
tokens coloured by what a step does to them or by their log-ratio.
"""

import html
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from launch import page
from launch.page import Heading
from launch.signed_colours import Colours, colours_of
from lm.data.partial_text import PartialText
from lm.data.tokenizers import Tokenizer
from lm.rollouts.inspection import RolloutInspection
from lm.rollouts.sampling import ends_of

_FIGURES = {
    "reward": "reward",
    "reward_std": "its deviation",
    "solved": "solved",
    "groups_without_signal": "groups without signal",
    "response_length": "tokens of an answer",
    "entropy": "entropy of a token",
}


class _Answer(NamedTuple):
    """Where an answer is: its row, the positions of its segment, and the first that was drawn."""

    row: int
    places: np.ndarray
    first: int


def render(inspection: RolloutInspection, tokenizer: Tokenizer, heading: Heading) -> str:
    """Returns the page: groups in the order in which they were asked.

    Args:
      inspection: the rollout.
      tokenizer: of the run.
      heading: of the page; its weighting describes the objective.
    """
    groups = _groups(inspection.batch)
    answers = [answer for group in groups for answer in group]

    def column(x_BT):
        return np.concatenate([x_BT[one.row, one.places[one.first :]] for one in answers])

    pull, ratios, losses = map(column, (inspection.pull, inspection.log_ratio, inspection.nll))
    is_target = column(inspection.batch["weights"]) != 0
    ratio = "log-ratio" if inspection.compared else "log-probability"
    columns = [
        ("pull", pull),
        (ratio, ratios),
        ("probability", np.exp(-losses)),
        ("entropy", column(inspection.entropy)),
    ]
    colours = colours_of(pull, ratios, is_target)
    about = (
        f"Run {heading.run}, step {heading.step:,}. {len(answers):,} answers to {len(groups):,} "
        f"prompts, {len(pull):,} tokens that were drawn; the batch is all of them."
    )
    figures = {label: inspection.metrics.get(name) for name, label in _FIGURES.items()}
    return page.fill(
        "answers_page.html",
        title=html.escape(f"Answers to {heading.source}"),
        objective=html.escape(heading.weighting),
        about=html.escape(about),
        figures=page.figures({k: x for k, x in figures.items() if x is not None}),
        ratio=ratio,
        unit="answers",
        records="\n".join(_sections(inspection, groups, tokenizer, colours)),
        data=page.numbers_as_json(columns, is_target),
        **colours.scales,
    )


def _groups(batch: dict[str, np.ndarray]) -> list[list[_Answer]]:
    """The answers of each group, in the order of the rows."""
    found: dict[int, list[_Answer]] = {}
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, int(ids.max()) + 1):
            places = np.flatnonzero(ids == segment)
            # An answer without a reward has weight 0, but its tokens have been drawn.
            drawn = batch["weights"][row, places] != 0
            drawn |= batch["behaviour_log_probability"][row, places] != 0
            group = int(batch["group_ids"][row, places[0]])
            found.setdefault(group, []).append(_Answer(row, places, int(np.argmax(drawn))))
    return [found[group] for group in sorted(found)]


def _sections(inspection, groups, tokenizer: Tokenizer, colours: Colours) -> Iterator[str]:
    """Yields a heading and the answers of each prompt."""
    for group in groups:
        head, shown = group[0], []
        prompt = inspection.batch["tokens"][head.row, head.places[: head.first + 1]]
        for answer in group:
            place = answer.places[answer.first]
            reward, advantage, weight = (
                float(inspection.batch[name][answer.row, place])
                for name in ("rewards", "advantages", "weights")
            )
            said = f"reward {reward:.4g}, advantage {advantage:+.3f}" if weight else "no reward"
            ids = inspection.batch["targets"][answer.row, answer.places[answer.first :]]
            tokens = _tokens(ids, tokenizer, colours)
            shown.append(f"<div><h3>{said}</h3><pre>{tokens}</pre></div>")
        text = html.escape(tokenizer.decode(prompt))
        yield f'<h2 class="asked">{text}</h2>\n<div class="answers">{"".join(shown)}</div>'


def _tokens(ids: np.ndarray, tokenizer: Tokenizer, colours: Colours) -> str:
    partial, parts, ends = PartialText(tokenizer), [], ends_of(tokenizer)
    for count, token in enumerate(ids, 1):
        piece = partial.extend(ids[:count], count == len(ids))
        is_end = int(token) in ends
        content = page.mark("end", "raw") if is_end else page.text_content(piece)
        parts.append(colours.next_span(content))
    return "".join(parts)
