"""A forest plot as an SVG file: differences with their intervals, one row each, a zero line.

The file needs no script, font or style from outside, and equal rows give equal bytes. It has a
ground of its own, light or dark as the reader's system asks, so that it can be read on any page,
from a file or as an element of the page.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from lm.studies import power
from lm.studies.outcomes import Outcome

_WIDTH, _LEFT, _RIGHT = 820, 216, 496  # of the file; where the axis begins and ends
_ROW, _HEAD, _FOOT = 22, 30, 30  # heights: a row, the title of a panel, its axis
_FAR = 8.0  # intervals that reach further than this times the median are cut off

# Every selector is below the class of the plot: the style of an element is that of its whole page.
_STYLE = """
.f .g{fill:#fdfdfc;stroke:#c9ced3}.f .l{stroke:#e3e6e9}.f .z{stroke:#66707a}
.f text{font:12.5px Helvetica,Arial,"Liberation Sans",sans-serif;fill:#1b1f23}
.f .h{font-weight:bold}.f .e{text-anchor:end}.f .m{text-anchor:middle}.f .q{fill:#5c656e}
.f .b{stroke:#00704f;fill:#00704f}.f .w{stroke:#b04a00;fill:#b04a00}
.f .n{stroke:#66707a;fill:#66707a}.f .s{stroke:#1b1f23}
.f text.b,.f text.w,.f text.n{stroke:none}.f .t{stroke-width:1.3}.f .k{stroke-width:5}
@media(prefers-color-scheme:dark){.f .g{fill:#14171a;stroke:#4a525a}.f .l{stroke:#2b3137}
.f .z{stroke:#939ca5}.f text{fill:#e8eaec}.f .q{fill:#a3acb5}.f .b{stroke:#35c79a;fill:#35c79a}
.f .w{stroke:#ff9a57;fill:#ff9a57}.f .n{stroke:#939ca5;fill:#939ca5}.f .s{stroke:#e8eaec}}
""".replace("\n", "")


class Effect(NamedTuple):
    """A difference to the baseline.

    Attributes:
      label: of what is compared with the baseline.
      difference: the mean.
      low: lower end of the interval that is corrected for all comparisons; -inf with one seed.
      high: its upper end.
      low_alone: lower end of the interval of this comparison alone, within the other.
      high_alone: its upper end.
      verdict: "better", "worse" or "not resolved", by the corrected interval.
      digits: behind the point.
      unit: of the numbers; "" for a share.
      seeds: the difference of each seed, drawn as ticks; () draws none.
    """

    label: str
    difference: float
    low: float
    high: float
    low_alone: float
    high_alone: float
    verdict: str
    digits: int = 4
    unit: str = "bits/byte"
    seeds: tuple[float, ...] = ()

    def number(self) -> str:
        """The difference with its sign."""
        return f"{self.difference:+.{self.digits}f}"

    def interval(self) -> str:
        """The corrected interval."""
        if not math.isfinite(self.low):
            return "unbounded"
        return f"{self.low:+.{self.digits}f} to {self.high:+.{self.digits}f}"


def effect(outcome: Outcome, seeds: Sequence[float] = ()) -> Effect:
    """The row of a variant that was compared, `outcome.comparison`, with the ticks of `seeds`."""
    c = outcome.comparison
    low, high = c.low, c.high
    if c.seeds > 1:
        half = power.critical(c.seeds, 1, outcome.row.confidence) * c.standard_error
        low, high = c.difference - half, c.difference + half
    ends = (c.low, c.high, low, high)
    return Effect(outcome.variant, c.difference, *ends, c.verdict, seeds=tuple(seeds))


class Panel(NamedTuple):
    """Effects on one axis.

    Attributes:
      title: above them.
      effects: from top to bottom, at least one.
    """

    title: str
    effects: Sequence[Effect]


def svg(panels: Sequence[Panel], title: str, description: str) -> str:
    """The file: panels below each other, each with an axis of its own that holds 0.

    The thick line of a row is the interval of its comparison alone, the thin one is corrected for
    all of its panel; a tick above it is a seed. Rows that reach much further than the others end in
    an arrow.

    Args:
      panels: at least one.
      title: of the whole, for readers who hear it.
      description: what can be seen in it, for the same.
    """
    parts, y = [], 6
    for panel in panels:
        parts += _panel(panel, y)
        y += _HEAD + _ROW * len(panel.effects) + _FOOT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" '
        f'height="{y}" class="f" role="img" aria-labelledby="forest-title forest-text">'
    )
    names = (
        f'<title id="forest-title">{_text(title)}</title>'
        f'<desc id="forest-text">{_text(description)}</desc>'
    )
    ground = f'<rect class="g" x=".5" y=".5" width="{_WIDTH - 1}" height="{y - 1}" rx="6"/>'
    return "\n".join([head, names, f"<style>{_STYLE}</style>", ground, *parts, "</svg>\n"])


def _panel(panel: Panel, top: float) -> list[str]:
    low, high = _reach(panel.effects)
    scale = (_RIGHT - _LEFT) / (high - low)

    def at(value: float) -> float:
        return _LEFT + (min(max(value, low), high) - low) * scale

    first = top + _HEAD
    base = first + _ROW * len(panel.effects)
    parts = [f'<text class="h" x="12" y="{top + 18}">{_text(panel.title)}</text>']
    for tick in _ticks(low, high):
        x, kind = at(tick), "z" if tick == 0 else "l"
        parts.append(f'<path class="{kind}" d="M{x:.1f} {first}V{base + 4}"/>')
        parts.append(f'<text class="m q" x="{x:.1f}" y="{base + 18}">{tick:+g}</text>')
    for row, effect in enumerate(panel.effects):
        parts += _row(effect, first + _ROW * row + _ROW // 2, at, low, high)
    return [part.replace(">+0</text>", ">0</text>") for part in parts]


def _row(effect: Effect, y: float, at, low: float, high: float) -> list[str]:
    kind = {"better": "b", "worse": "w"}.get(effect.verdict, "n")
    found = [f'<text class="e" x="{_LEFT - 10}" y="{y + 4}">{_text(effect.label)}</text>']
    if effect.low <= high and effect.high >= low:
        ends = [(effect.low, effect.high, "t"), (effect.low_alone, effect.high_alone, "k")]
        for start, end, width in ends:
            if start < high and end > low:
                line = f'd="M{at(start):.1f} {y}H{at(end):.1f}"'
                found.append(f'<path class="{kind} {width}" {line}/>')
    if effect.low < low:
        found.append(f'<path class="{kind}" d="M{_LEFT - 5} {y}l7 -4v8z"/>')
    if effect.high > high:
        found.append(f'<path class="{kind}" d="M{_RIGHT + 5} {y}l-7 -4v8z"/>')
    if low <= effect.difference <= high:
        found.append(f'<circle class="{kind}" cx="{at(effect.difference):.1f}" cy="{y}" r="4.5"/>')
    for value in effect.seeds:
        if low <= value <= high:
            found.append(f'<path class="s" d="M{at(value):.1f} {y - 10}v5"/>')
    numbers = f"{effect.number()}  ({effect.interval()})"
    found.append(f'<text x="{_RIGHT + 14}" y="{y + 4}">{_text(numbers)}</text>')
    found.append(
        f'<text class="{kind} e" x="{_WIDTH - 12}" y="{y + 4}">{_text(effect.verdict)}</text>'
    )
    return found


def _reach(effects: Sequence[Effect]) -> tuple[float, float]:
    """The ends of an axis: 0 and all intervals, but for those that reach far beyond the others."""
    sizes = {one: _size(one) for one in effects}
    usual = sorted(size for size in sizes.values() if size > 0) or [1.0]
    limit = _FAR * usual[(len(usual) - 1) // 2]
    kept = [one for one in effects if sizes[one] <= limit]
    ends = [0.0]
    for one in kept:
        ends += [*one.seeds, one.difference]
        ends += [x for x in (one.low, one.high) if math.isfinite(x)]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low or 1.0)
    return low - margin, high + margin


def _size(effect: Effect) -> float:
    finite = [x for x in (effect.low, effect.high) if math.isfinite(x)]
    return max(map(abs, [effect.difference, *finite]))


def _ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within the ends, as many as have room."""
    power = 10.0 ** math.floor(math.log10(high - low))
    for size in (0.1, 0.2, 0.5, 1, 2, 5):
        step = power * size
        count = range(math.ceil(low / step), math.floor(high / step) + 1)
        found = [float(f"{one * step:.6g}") for one in count]
        longest = max(len(f"{tick:+g}") for tick in found)
        if (6.5 * longest + 8) * (high - low) <= step * (_RIGHT - _LEFT):
            break
    return found


def _text(text: str) -> str:
    return html.escape(text, quote=False)
