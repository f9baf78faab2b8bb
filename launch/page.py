"""A self-contained HTML page of texts, with tokens coloured by weight or by loss.

Its template is `page.html`; `page.css` and `page.js` are in every page of tokens.
"""

import codecs
import html
import importlib.resources
import string
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lm import strict_json
from lm.data.documents import Document, SpecialToken
from lm.data.layout import rendered
from lm.data.tokenizers import Tokenizer
from lm.references.inspection import Inspection

_BINS = 24

_SHARED = ("page.css", "page.js")

# The largest 1% of values get the full colour: scaled by one outlier, all others would be pale.
_BRIGHTEST = 99

_SHOWN_AS = {"\n": "↵", "\t": "→", "\r": "␍"}
_LAYOUT_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Heading(NamedTuple):
    """The heading of a page.

    Attributes:
      source: name of the text.
      run: name of the run.
      step: of the checkpoint.
      weighting: description of the weighting.
    """

    source: str
    run: str
    step: int
    weighting: str


def render(
    inspection: Inspection, documents: Sequence[Document], tokenizer: Tokenizer, heading: Heading
) -> str:
    """Returns the page. It shows all tokens in the order of the text, without padding.

    Args:
      inspection: weights and losses of the tokens.
      documents: the texts.
      tokenizer: of the run.
      heading: of the page.
    """
    batch = inspection.batch
    real_RT = batch["segment_ids"] != 0
    is_target = batch["weights"][real_RT] != 0
    weights, losses = inspection.weights[real_RT], inspection.nll[real_RT]
    columns = [
        ("weight", weights),
        ("loss", losses),
        ("probability", np.exp(-losses)),
        ("entropy", inspection.entropy[real_RT]),
        *((name, values[real_RT]) for name, values in inspection.references.items()),
    ]
    strongest, bright = brightest(weights[is_target]), brightest(losses[is_target])
    shades = zip(
        is_target.tolist(),
        (np.isfinite(weights) & np.isfinite(losses)).tolist(),
        shades_of(weights, strongest),
        shades_of(losses, bright),
        strict=True,
    )
    count, cuts = len(documents), len(inspection.document_R) - len(documents)
    about = (
        f"Run {heading.run}, step {heading.step:,}. {count:,} document{'s' * (count > 1)} of "
        f"{len(weights):,} tokens in {count + cuts:,} windows of at most {real_RT.shape[1]:,}, "
        "each a row; the batch is all of them."
    )
    return fill(
        "page.html",
        title=html.escape(f"Token weights of {heading.source}"),
        weighting=html.escape(heading.weighting),
        about=html.escape(about),
        figures=_figures(inspection.metrics),
        chart=_chart(losses[is_target], batch["weights"][real_RT][is_target], weights[is_target]),
        brightest_weight=brightest_in_words(strongest, "", weights[is_target]),
        brightest_loss=brightest_in_words(bright, " nats", losses[is_target]),
        legend=_legend(not is_target.all(), cuts > 0),
        texts="\n".join(_texts(inspection, documents, tokenizer, shades)),
        data=numbers_as_json(columns, is_target),
    )


def fill(template: str, **values: str) -> str:
    """Returns a page: a template of this package with values, style and script in their places."""
    folder = importlib.resources.files("launch")
    read = {name: folder.joinpath(name).read_text("utf-8") for name in (template, *_SHARED)}
    shared = {"style": read["page.css"], "script": read["page.js"]}
    return string.Template(read[template]).substitute(**shared, **values)


def pieces(document: Document, tokenizer: Tokenizer) -> list[bytes]:
    """Returns the UTF-8 bytes of each target of a document, and b"" for the end of text.

    The special tokens of a chat stand for their own names.
    """
    document = rendered(document, tokenizer)
    parts = []
    for text, _ in document.spans:
        content, start = text.encode(), 0
        special = isinstance(text, SpecialToken)
        for size in [len(content)] if special else tokenizer.encode(text)[1].tolist():
            parts.append(content[start : start + size])
            start += size
    return parts[1:] if document.framed else [*parts, b""]


def _texts(inspection, documents, tokenizer, shades) -> Iterator[str]:
    """Yields a <pre> element for each document, with a <span> for each token."""
    lengths_R = (inspection.batch["segment_ids"] != 0).sum(axis=1)
    for index, document in enumerate(documents):
        lengths = lengths_R[inspection.document_R == index]
        starts = {int(start): i for i, start in enumerate(np.cumsum(lengths)[:-1], 2)}
        covered = pieces(document, tokenizer)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts = []
        for number, piece in enumerate(covered):
            if number in starts:
                parts.append(f"<b>window {starts[number]}</b>")
            at_end = number == len(covered) - 1 and not piece
            content = mark("end", "raw") if at_end else token_content(piece, decoder)
            parts.append(_span(content, *next(shades)))
        title = f"<h2>{html.escape(document.name)}</h2>\n" if len(documents) > 1 else ""
        yield f"{title}<pre>{''.join(parts)}</pre>"


def _span(content: str, is_target: bool, sound: bool, weight: float, loss: float) -> str:
    names = " ".join(["prompt"] * (not is_target) + ["bad"] * (is_target and not sound))
    of_class = f' class="{names}"' if names else ""
    return f'<span{of_class} style="--w:{weight:.3g};--l:{loss:.3g}">{content}</span>'


def token_content(piece: bytes, decoder: codecs.IncrementalDecoder) -> str:
    """Returns what the page shows for a token: its text, or bytes in hexadecimal.

    Bytes are shown for a character that is spread over several tokens; the character itself is
    shown at the token that completes it.
    """
    text = decoder.decode(piece)
    left = decoder.getstate()[0] if text else piece
    content = text_content(text)
    if left or not piece:
        content += mark(left.hex(" ").upper() or "∅", "raw")
    return content


def text_content(text: str) -> str:
    """Returns a text as the page shows it, with characters visible that have no glyph."""
    only_space = not text.strip()
    return "".join(_character(c, only_space) for c in text)


def _character(c: str, in_space: bool) -> str:
    if c in _SHOWN_AS:
        return mark(_SHOWN_AS[c]) + (c if c != "\r" else "")
    if c == " " and in_space:
        return '<i class="dot"> </i>'
    if unicodedata.category(c) == "Cc" or c in _LAYOUT_CONTROLS:
        return mark(f"U+{ord(c):04X}", "raw")
    return html.escape(c)


def mark(sign: str, kind: str = "") -> str:
    """Returns a sign that is visible, but is not copied with the text."""
    of_class = f' class="{kind}"' if kind else ""
    return f'<i{of_class} data-c="{sign}"></i>'


def shades_of(values: np.ndarray, highest: float) -> list[float]:
    """Returns min(|x| / |highest|, 1); 0 for values that are not finite."""
    size = np.abs(np.where(np.isfinite(values), values, 0.0))
    return np.minimum(size / (abs(highest) or 1.0), 1.0).tolist()


def brightest(values: np.ndarray) -> float:
    """Returns the value that gets the full colour; negative if there are negative weights."""
    finite = values[np.isfinite(values)]
    if not finite.any():
        return 1.0
    size = np.percentile(np.abs(finite), _BRIGHTEST) or np.abs(finite).max()
    return float(-size if finite.min() < 0 else size)


def brightest_in_words(highest: float, unit: str, values: np.ndarray) -> str:
    """Returns the value of the full colour, and whether there are values beyond it."""
    beyond = np.abs(values[np.isfinite(values)]).max(initial=0.0) > abs(highest)
    return f"{highest:.3g}{unit}{' and beyond' * bool(beyond)}"


def _legend(prompts: bool, cuts: bool) -> str:
    notes = ['<span class="prompt">grey: a prompt, not a target</span>'] * prompts
    notes += ["<span>window 2: the model sees nothing before it</span>"] * cuts
    return "\n".join(notes)


def _figures(metrics: dict[str, float]) -> str:
    targets = metrics["targets"]
    shown = [
        ("targets", f"{targets:,.0f}", ""),
        ("share kept", f"{metrics['kept_share']:.1%}", ""),
        ("effective sample", f"{metrics['effective_sample_size']:,.0f}", f"of {targets:,.0f}"),
        ("weight entropy", f"{metrics['weight_entropy']:.3f}", f"of {np.log(targets):.3f}"),
        ("mean loss", f"{metrics['mean_loss']:.4f}", "nats"),
        ("weighted loss", f"{metrics['loss']:.4f}", "nats"),
    ]
    return "\n".join(
        f"<div><dt>{name}</dt><dd>{value} <small>{unit}</small></dd></div>"
        for name, value, unit in shown
    )


def figures(values: dict[str, float]) -> str:
    """Returns entries of a <dl>: label -> value."""
    return "\n".join(
        f"<div><dt>{label}</dt><dd>{value:.4f}</dd></div>" for label, value in values.items()
    )


def _chart(losses, data_weights, weights) -> str:
    """Plots how the weights of the data and of the weighting are distributed over loss, as SVG."""
    width, height, left, right, base = 640, 166, 40, 12, 140
    sound = np.isfinite(losses) & np.isfinite(weights)
    losses = np.where(sound, losses, 0.0)
    top = _round_up(losses.max() or 1.0)

    def shares(sizes):
        counts, _ = np.histogram(losses, _BINS, (0.0, top), weights=np.where(sound, sizes, 0.0))
        return counts / (counts.sum() or 1.0)

    before, after = shares(data_weights), shares(np.abs(weights))
    highest = max(before.max(), after.max()) or 1.0
    step = (width - left - right) / _BINS
    bars, line = [], [f"M{left} {base}"]
    for i, (share, weight_share) in enumerate(zip(before, after, strict=True)):
        x, size = left + i * step, weight_share / highest * (base - 14)
        bars.append(f"M{x + 1:.1f} {base}v{-size:.1f}h{step - 2:.1f}v{size:.1f}z")
        y = base - share / highest * (base - 14)
        line.append(f"L{x:.1f} {y:.1f}L{x + step:.1f} {y:.1f}")
    line.append(f"L{left + _BINS * step:.1f} {base}")
    ticks = "".join(
        f'<text x="{left + share * step * _BINS:.0f}" y="{base + 16}" '
        f'text-anchor="middle">{share * top:g}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Shares by loss">'
        f'<path class="weights" d="{"".join(bars)}"/><path class="targets" d="{"".join(line)}"/>'
        f'<path class="axis" d="M{left} {base}H{width - right}"/>{ticks}'
        f'<text x="{left - 6}" y="18" text-anchor="end">{highest:.0%}</text>'
        f'<text x="{left - 6}" y="{base + 4}" text-anchor="end">0%</text></svg>'
    )


def _round_up(x: float) -> float:
    """Returns the smallest number of at least x that is 4, 8, 10, 20 or 40 times a power of ten."""
    unit = 10.0 ** np.floor(np.log10(x / 4))
    return 4 * unit * next(n for n in (1, 2, 2.5, 5, 10) if n * unit >= x / 4 * (1 - 1e-9))


def numbers_as_json(columns: Sequence[tuple[str, np.ndarray]], is_target: np.ndarray) -> str:
    """Returns the numbers as JSON; it holds no text, so it cannot close its script element."""
    content = {
        "columns": [{"label": n, "values": [_number(x) for x in v.tolist()]} for n, v in columns],
        "prompt": [int(not x) for x in is_target],
    }
    return strict_json.dumps(content, separators=(",", ":"))


def _number(x: float) -> float | str:
    return float(f"{x:.6g}") if np.isfinite(x) else str(x)
