"""A self-contained HTML page of preference records: both answers of a pair side by side, with
tokens coloured by their log-ratio or by what the objective does to them.
"""

import codecs
import html
from collections.abc import Iterator

import numpy as np

from launch import page
from launch.page import Heading
from launch.signed_colours import colours_of
from lm.data.tokenizers import Tokenizer
from lm.references.pair_inspection import PairInspection

_FIGURES = {
    "accuracy": "accuracy",
    "margin": "margin of rewards",
    "reward_chosen": "reward, chosen",
    "reward_rejected": "reward, rejected",
    "loss": "loss of the objective",
}


def render(inspection: PairInspection, tokenizer: Tokenizer, heading: Heading) -> str:
    """Returns the page. It shows every token of every answer, and each prompt as the answer has it.

    Args:
      inspection: the records.
      tokenizer: of the run.
      heading: of the page; its weighting describes the objective.
    """
    batch, ratio = inspection.batch, "log-ratio" if inspection.compared else "log-probability"
    # Answers under the prompts of other records are of no side.
    shown_RT = batch["sides"] != 0
    is_target = batch["weights"][shown_RT] != 0
    pull, ratios = inspection.pull[shown_RT], inspection.log_ratio[shown_RT]
    losses = inspection.nll[shown_RT]
    columns = [("pull", pull), (ratio, ratios), ("loss", losses), ("probability", np.exp(-losses))]
    colours = colours_of(pull, ratios, is_target)
    count = len(inspection.documents)
    about = (
        f"Run {heading.run}, step {heading.step:,}. {count:,} record{'s' * (count > 1)} of "
        f"{len(losses):,} tokens; the batch is all of them."
    )
    return page.fill(
        "answers_page.html",
        title=html.escape(f"Preferences of {heading.source}"),
        objective=html.escape(heading.weighting),
        about=html.escape(about),
        figures=page.figures(
            {
                label: inspection.metrics[name]
                for name, label in _FIGURES.items()
                if name in inspection.metrics
            }
        ),
        ratio=ratio,
        unit="records",
        records="\n".join(_records(inspection, tokenizer, colours, ratio)),
        data=page.numbers_as_json(columns, is_target),
        **colours.scales,
    )


def _records(inspection, tokenizer, colours, ratio) -> Iterator[str]:
    """Yields a heading and the answers of each record."""
    for r, document in enumerate(inspection.documents):
        answers = []
        for number, answer in enumerate(document.answers):
            of_answer_T = inspection.batch["segment_ids"][r] == number + 1
            is_target_T = of_answer_T & (inspection.batch["weights"][r] != 0)
            total = inspection.log_ratio[r][is_target_T].sum()
            side = "rejected" if number or document.label is False else "chosen"
            name = side if document.label is None else f"{side}, label {document.label}".lower()
            reward = inspection.terms.get(f"reward_{side}")
            said = f"{ratio} {total:+.3f} over {is_target_T.sum():,} tokens"
            if reward is not None:
                said += f", reward {reward[r]:+.3f}"
            answers.append(
                f"<div><h3>{name}</h3><pre>{_tokens(answer, tokenizer, colours)}</pre>"
                f"<p>{said}</p></div>"
            )
        margin = inspection.terms.get("margin")
        verdict = f" <small>margin {margin[r]:+.3f}</small>" if margin is not None else ""
        yield (
            f"<h2>{html.escape(document.name)}{verdict}</h2>\n"
            f'<div class="answers">{"".join(answers)}</div>'
        )


def _tokens(answer, tokenizer, colours) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    covered = page.pieces(answer, tokenizer)
    parts = []
    for number, piece in enumerate(covered):
        at_end = number == len(covered) - 1 and not piece
        content = page.mark("end", "raw") if at_end else page.token_content(piece, decoder)
        parts.append(colours.next_span(content))
    return "".join(parts)
