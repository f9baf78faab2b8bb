"""Colours of tokens on a page of answers: by pull, and by log-ratio, each with its sign."""

from collections.abc import Iterator

import numpy as np

from launch import page

_COLOURS = {True: "var(--loss)", False: "var(--weight)"}  # negative, positive


class Colours:
    """Gives the tokens of a page their spans, in order.

    Attributes:
      scales: ends of both colour scales, as `answers_page.html` names them.
    """

    def __init__(self, spans: Iterator[tuple], scales: dict[str, str]):
        self._spans, self.scales = spans, scales

    def next_span(self, content: str) -> str:
        """The element of the next token, which shows `content`."""
        is_target, (pull, pull_colour), (ratio, ratio_colour) = next(self._spans)
        of_class = "" if is_target else ' class="prompt"'
        style = f"--p:{pull:.3g};--pc:{pull_colour};--r:{ratio:.3g};--rc:{ratio_colour}"
        return f'<span{of_class} style="{style}">{content}</span>'


def colours_of(pull: np.ndarray, ratio: np.ndarray, is_target: np.ndarray) -> Colours:
    """The colours of tokens, arrays [tokens] in the order in which the page shows them.

    Full colour is that of the largest 1% of targets, in size.
    """
    both = {"pull": pull, "ratio": ratio}
    most = {name: abs(page.brightest(x[is_target])) for name, x in both.items()}
    spans = zip(
        is_target.tolist(), *(_signed(x, most[name]) for name, x in both.items()), strict=True
    )
    scales = {f"most_{name}": f"{x:.3g}" for name, x in most.items()}
    return Colours(spans, scales | {f"least_{name}": f"-{x:.3g}" for name, x in most.items()})


def _signed(values: np.ndarray, highest: float) -> list[tuple[float, str]]:
    """The shade of every value, and the colour of its sign."""
    return [
        (shade, _COLOURS[bool(x < 0)])
        for shade, x in zip(page.shades_of(values, highest), values, strict=True)
    ]
