"""A report as a list of blocks, written as Markdown or as one self-contained HTML page."""

import html
import importlib.resources
import re
import string
from collections.abc import Sequence
from typing import NamedTuple


class Heading(NamedTuple):
    """The title of a section."""

    text: str


class Paragraph(NamedTuple):
    """Text; what stands between backquotes is shown as code."""

    text: str


class Items(NamedTuple):
    """A bulleted list; on the page the verdicts "better" and "worse" are coloured."""

    texts: Sequence[str]


class Table(NamedTuple):
    """A table; the first column is aligned as text, the others as numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Figure(NamedTuple):
    """An SVG element and its caption; Markdown shows the caption only."""

    svg: str
    caption: str


class Gallery(NamedTuple):
    """Small figures side by side, as many in a row as there is room for."""

    figures: Sequence[Figure]


class Details(NamedTuple):
    """Blocks that the page shows once the reader opens them by their summary."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Items | Table | Figure | Gallery | Details


def markdown(blocks: Sequence[Block], title: str = "") -> str:
    """Returns the blocks as Markdown, below a heading with the title if there is one."""
    parts = [f"# {title}"] if title else []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Paragraph(text):
                parts.append(text)
            case Items(texts):
                parts.append("\n".join(f"- {text}" for text in texts))
            case Figure(_, caption):
                parts.append(f"(A figure of the page: {caption})")
            case Gallery(figures):
                parts.append(markdown(figures).rstrip("\n"))
            case Details(summary, inner):
                parts.append(markdown([Paragraph(summary), *inner]).rstrip("\n"))
            case Table(head, rows):
                lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
                escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in escaped))
    return "\n\n".join(parts) + "\n"


def page(blocks: Sequence[Block], title: str) -> str:
    """Returns the blocks as an HTML page with a light and a dark style."""
    body = "\n".join([f"<h1>{_text(title)}</h1>", *map(_element, blocks)])
    frame = importlib.resources.files("launch").joinpath("report.html").read_text("utf-8")
    return string.Template(frame).substitute(title=html.escape(title), body=body)


def _element(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_text(text)}</h2>"
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Items(texts):
            return f"<ul>{''.join(f'<li>{_verdict(_text(text))}</li>' for text in texts)}</ul>"
        case Table(head, rows):
            top = "".join(f'<th scope="col">{_text(c)}</th>' for c in head)
            cells = [
                f"<tr>{''.join(f'<td>{_verdict(_text(c))}</td>' for c in row)}</tr>" for row in rows
            ]
            return (
                # What scrolls must take the focus, or the keyboard cannot scroll it.
                '<div class="scroll" tabindex="0" role="group" aria-label="table"><table>'
                f"<thead><tr>{top}</tr></thead><tbody>{''.join(cells)}</tbody></table></div>"
            )
        case Figure(svg, caption):
            return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"
        case Gallery(figures):
            return f'<div class="gallery">{"".join(map(_element, figures))}</div>'
        case Details(summary, inner):
            content = "\n".join(map(_element, inner))
            return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _text(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _verdict(text: str) -> str:
    """Colours the verdict in a sentence `NAME: better, ...`, or in a cell of one word."""
    return re.sub(r"(^|: )(better|worse)(?=,|$)", r'\1<span class="\2">\2</span>', text, count=1)
