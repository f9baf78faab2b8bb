"""Charts as SVG elements that need neither a script nor a style of their own.

Their classes are those of `report.html`. A browser shows the numbers of what is pointed at.
"""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from launch.figures import COLOURS

_DASHES = ("", "7 3", "2 3", "9 3 2 3")
# Marks of 8 units around (0, 0), so that lines differ by shape as well as by colour.
_MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5l5 5l-5 5l-5 -5z",
    "M0 -5l5 9h-10z",
    "M0 5l5 -9h-10z",
)
_CHARACTER = 6.6  # Width at the font size of the style.


class Line(NamedTuple):
    """A line through points.

    Attributes:
      name: shown in the legend.
      points: (x, y), in the order in which they are joined.
      notes: for each point, what is shown when it is pointed at.
    """

    name: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str]


class HeatRow(NamedTuple):
    """A row of a heat map.

    Attributes:
      name: shown left of it.
      values: one for each column, or a single one that is as wide as all columns.
      notes: for each value, what is shown when it is pointed at.
    """

    name: str
    values: Sequence[float]
    notes: Sequence[str]


def lines(shown: Sequence[Line], xlabel: str, ylabel: str) -> str:
    """Returns a plot with a legend above; y is logarithmic where it spans more than a decade.

    Args:
      shown: lines with finite points, at least one.
      xlabel: label of the x axis.
      ylabel: label of the y axis; a logarithmic one says so.
    """
    width, left, right, height, top = 480, 62, 16, 210, 18 * len(shown) + 34
    x_all, y_all = np.array([point for line in shown for point in line.points], float).T
    log = y_all.min() > 0 and y_all.max() > 10 * y_all.min()
    x_ticks = _ticks(x_all.min(), x_all.max(), False)
    y_ticks = _ticks(y_all.min() if log else min(0.0, y_all.min()), y_all.max(), log)
    place = np.log10 if log else np.asarray
    x_low, x_high, y_low, y_high = x_ticks[0], x_ticks[-1], place(y_ticks[0]), place(y_ticks[-1])

    def at(x, y):
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return across, top + (y_high - place(y)) / (y_high - y_low) * height

    parts = []
    for tick in y_ticks:
        y = at(x_low, tick)[1]
        parts.append(f'<path class="axis" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(_label(left - 6, y + 4, f"{tick:g}", "end", "quiet"))
    for tick in x_ticks:
        x = at(tick, y_ticks[0])[0]
        parts.append(_label(x, top + height + 19, f"{tick:g}", "middle", "quiet"))
    parts.append(_label(left - 6, top - 14, ylabel + ", logarithmic" * bool(log), "start"))
    parts.append(_label((left + width - right) / 2, top + height + 38, xlabel, "middle"))
    for i, line in enumerate(shown):
        colour, mark = COLOURS[i % len(COLOURS)], _MARKS[i % len(_MARKS)]
        path = "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in line.points)
        stroke = f'fill="none" stroke="{colour}" stroke-width="2"'
        stroke += f' stroke-dasharray="{_DASHES[i % len(_DASHES)]}"'
        parts.append(f'<path d="M{path}" {stroke}/>')
        for point, note in zip(line.points, line.notes, strict=True):
            x, y = at(*point)
            moved = f'transform="translate({x:.1f} {y:.1f})"'
            parts.append(f'<path {moved} d="{mark}" fill="{colour}">{_note(note)}</path>')
        y = 18 * i + 10
        parts.append(f'<path d="M{left - 4} {y}h28" {stroke}/>')
        parts.append(f'<path transform="translate({left + 10} {y})" d="{mark}" fill="{colour}"/>')
        parts.append(_label(left + 32, y + 4, line.name))
    return _svg(width, top + height + 48, f"{ylabel} by {xlabel}", parts, "plot wide")


def heat_map(rows: Sequence[HeatRow], columns: int, xlabel: str, unit: str) -> str:
    """Returns a map of positive numbers, the darker (on a dark page: the brighter) the larger.

    Colours are on a logarithmic scale that the legend gives; values of 0 are left empty.

    Args:
      rows: from top to bottom, at least one.
      columns: number of them, each named by its index.
      xlabel: label of the columns.
      unit: what the numbers are, for the legend.
    """
    left = 12 + _CHARACTER * max(len(row.name) for row in rows)
    cell = min(40.0, max(10.0, (520 - left) / columns))
    width, base = left + cell * columns + 8, 22 * len(rows) + 6
    found = np.array([v for row in rows for v in row.values if v > 0] or [1.0])
    low, high = np.log10(found.min()), np.log10(found.max())

    def colour(value):
        if not value > 0:
            return "fill:none"
        share = (np.log10(value) - low) / (high - low) if high > low else 1.0
        return f"fill:rgb(var(--heat) / {0.08 + 0.92 * share:.3f})"

    parts = []
    for number, row in enumerate(rows):
        y, size = 22 * number + 4, cell * (columns if len(row.values) == 1 else 1)
        parts.append(_label(left - 6, y + 15, row.name, "end"))
        for i, (value, note) in enumerate(zip(row.values, row.notes, strict=True)):
            parts.append(
                f'<rect class="cell" x="{left + i * size:.1f}" y="{y}" width="{size:.1f}" '
                f'height="20" style="{colour(value)}">{_note(note)}</rect>'
            )
    every = max(1, math.ceil(24 / cell)) if columns < 20 else 5 * math.ceil(24 / (5 * cell))
    for i in range(0, columns, every):
        parts.append(_label(left + (i + 0.5) * cell, base + 14, str(i), "middle", "quiet"))
    parts.append(_label(left - 6, base + 14, xlabel, "end", "quiet"))
    scale, scale_width = _heat_scale(found, colour, base + 28, unit)
    width = max(width, scale_width)
    svg = _svg(width, base + 50, f"{unit} by row and {xlabel}", [*parts, *scale], "plot")
    # Narrower, its cells and its text could not be told apart: then it scrolls.
    return (
        f'<div class="scroll" style="max-width:{width:.0f}px" tabindex="0" role="group" '
        f'aria-label="map"><div style="min-width:{0.8 * width:.0f}px">{svg}</div></div>'
    )


def _heat_scale(
    found: np.ndarray, colour: Callable[[float], str], y: int, unit: str
) -> tuple[list[str], float]:
    """The legend of a heat map and its width."""
    low, high = found.min(), found.max()
    values = np.geomspace(low, high, 9) if high > low else [high]
    x, name = 12 + _CHARACTER * len(f"{low:.2g}"), unit
    parts = [_label(x - 6, y + 12, f"{low:.2g}", "end")]
    for i, value in enumerate(values):
        box = f'x="{x + 12 * i:.1f}" y="{y}" width="12" height="14"'
        parts.append(f'<rect {box} style="{colour(value)}"/>')
    if high > low:
        name = f"{high:.2g}  {unit}, logarithmic"
    end = x + 12 * len(values)
    return [*parts, _label(end + 6, y + 12, name)], end + 14 + _CHARACTER * len(name)


def weights_and_codes(
    edges: np.ndarray, counts: np.ndarray, values: np.ndarray, code_counts: np.ndarray, unit: str
) -> str:
    """Returns a histogram of weights, upwards, and of codes at their values, downwards.

    Each has a scale of its own: its largest count is as long as there is room.

    Args:
      edges: [bins + 1] of the weights, symmetric about 0.
      counts: [bins].
      values: [levels] of the codes; those beyond the edges are not shown, nor is NaN.
      code_counts: [levels].
      unit: of the edges.
    """
    width, base, up, down = 240, 78, 70, 40
    reach = edges[-1]

    def x(value):
        return 6 + (value + reach) / (2 * reach) * (width - 12)

    step = x(edges[1]) - x(edges[0])
    bars = "".join(
        f"M{x(edge):.2f} {base}v{-up * size:.2f}h{step:.2f}v{up * size:.2f}z"
        for edge, size in zip(edges, counts / max(counts.max(), 1), strict=False)
        if size
    )
    shown = (np.abs(values) <= reach) & (code_counts > 0)
    gaps = np.diff(np.sort(x(values[shown])))
    thick = float(np.clip(0.7 * gaps.min(initial=6.0), 0.8, 6.0))
    sizes = code_counts / max(code_counts.max(), 1)
    stems = "".join(
        f"M{x(value) - thick / 2:.2f} {base + 1}h{thick:.2f}v{max(down * size, 1):.2f}"
        f"h{-thick:.2f}z"
        for value, size in zip(values[shown], sizes[shown], strict=True)
    )
    parts = [f'<path class="bars" d="{bars}"/><path class="codes" d="{stems}"/>']
    parts.append(f'<path class="axis" d="M6 {base + 0.5}H{width - 6}"/>')
    y = base + down + 16
    for tick in (-reach, -reach / 2, 0, reach / 2, reach):
        anchor = {-reach: "start", reach: "end"}.get(tick, "middle")
        parts.append(_label(x(tick), y, f"{tick:g}", anchor, "quiet"))
    parts.append(_label(width - 6, 12, unit, "end", "quiet"))
    return _svg(width, y + 6, f"weights (up) and codes (down) by value, {unit}", parts, "plot")


def histogram(edges: np.ndarray, counts: np.ndarray, unit: str) -> str:
    """Returns a low histogram with the first and the last edge as its labels."""
    width, base, up = 240, 40, 36
    step = (width - 12) / len(counts)
    bars = "".join(
        f"M{6 + i * step:.2f} {base}v{-up * size:.2f}h{step:.2f}v{up * size:.2f}z"
        for i, size in enumerate(counts / max(counts.max(), 1))
        if size
    )
    parts = [f'<path class="bars" d="{bars}"/><path class="axis" d="M6 {base}H{width - 6}"/>']
    parts.append(_label(6, base + 15, f"{edges[0]:g}", "start", "quiet"))
    parts.append(_label(width / 2, base + 15, unit, "middle", "quiet"))
    parts.append(_label(width - 6, base + 15, f"{edges[-1]:g}", "end", "quiet"))
    return _svg(width, base + 22, f"histogram, {unit}", parts, "plot")


def _ticks(low: float, high: float, log: bool) -> np.ndarray:
    """Round numbers, the first at most `low`, the last at least `high`."""
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    if not log:
        from matplotlib.ticker import MaxNLocator

        return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    powers = 10.0 ** np.arange(math.floor(np.log10(low)), math.ceil(np.log10(high)) + 1)
    ticks = np.outer(powers, (1, 2, 5)).reshape(-1) if len(powers) < 4 else powers
    first = np.flatnonzero(ticks <= low * (1 + 1e-9))[-1]
    last = np.flatnonzero(ticks >= high * (1 - 1e-9))[0]
    return ticks[first : last + 1]


def _label(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    of_class = f' class="{kind}"' if kind else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_class}>{html.escape(text)}</text>'
    )


def _note(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _svg(width: float, height: float, label: str, parts: Sequence[str], kind: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
    )
