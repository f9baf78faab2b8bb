"""Curves of reports and fits of laws, as SVG in the text colour of the page, light or dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Placeholders; `_svg` replaces them by the colours of the page.
_INK, _LINE = "#123456", "#654321"
# Okabe and Ito's palette without black and yellow: colour-blind readers can tell them apart, and
# their medium brightness suits light and dark pages.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a63d2", "#8c8c8c")
_STYLES = ("-", "--", ":", "-.")

Curves = Mapping[str, Mapping[int, Sequence[tuple[float, float]]]]


def curves(found: Curves, xlabel: str, ylabel: str, name: str, variants: Sequence[str]) -> str:
    """Plots means over seeds with a band of one standard error, as SVG.

    Args:
      found: variant -> seed -> points (x, y); only x that all seeds have are plotted.
      xlabel: label of the x axis.
      ylabel: label of the y axis.
      name: of the figure, unique on the page.
      variants: all variants; a variant's index decides its colour and line style.
    """
    figure, axes = _figure(3.6)
    for variant, by_seed in found.items():
        i = variants.index(variant)
        tables = [dict(points) for points in by_seed.values() if points]
        if not tables:
            continue
        x = sorted(set.intersection(*map(set, tables)))
        y = np.array([[table[at] for at in x] for table in tables])
        colour, style = COLOURS[i % 8], _STYLES[i // 8 % 4]
        mean = y.mean(axis=0)
        axes.plot(x, mean, style, color=colour, label=variant, marker="o", markersize=3)
        if len(tables) > 1:
            error = y.std(axis=0, ddof=1) / math.sqrt(len(tables))
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize=8, labelcolor=_INK, frameon=False)
    return _svg(figure, name)


def predictions(
    measured: Sequence[float],
    predicted: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    held_out: Sequence[bool],
    name: str,
) -> str:
    """Plots predicted against measured losses, nats per token, as SVG.

    Args:
      measured: losses.
      predicted: losses of the law.
      low: lower ends of the predictions' intervals.
      high: upper ends.
      held_out: whether the law was not fitted to a point; these points are filled.
      name: of the figure, unique on the page.
    """
    figure, axes = _figure(4.2)
    held = np.asarray(held_out, bool)
    x, y = np.asarray(measured), np.asarray(predicted)
    bars = np.maximum(0, [y - np.asarray(low), np.asarray(high) - y])
    for chosen, colour, fill, label in (
        (~held, COLOURS[0], "none", "fitted"),
        (held, COLOURS[1], COLOURS[1], "held out"),
    ):
        if chosen.any():
            axes.errorbar(
                x[chosen],
                y[chosen],
                bars[:, chosen],
                fmt="o",
                color=colour,
                markerfacecolor=fill,
                label=label,
                linewidth=1,
            )
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=_LINE, linewidth=1, zorder=0)
    axes.set(xlabel="measured loss, nats per token", ylabel="predicted")
    axes.legend(fontsize=8, labelcolor=_INK, frameon=False)
    return _svg(figure, name)


def _figure(height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    axes.tick_params(colors=_INK, labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.grid(color=_LINE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """Returns the figure as an SVG element; equal figures give equal text."""
    from matplotlib import pyplot as plt

    file = io.StringIO()
    # Text stays text; ids of one figure must not be those of another on the page.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    content = file.getvalue()
    content = content[content.index("<svg") :]
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    content = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", content, count=1)
    content = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", content, count=1)
    return content.replace(_INK, "var(--ink)").replace(_LINE, "var(--line)")
