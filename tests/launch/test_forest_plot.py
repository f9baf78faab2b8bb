"""Forest plots: where their marks are, and that the committed ones fit."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from launch import forest_plot
from launch.forest_plot import Effect, Panel

ROOT = Path(__file__).parent.parent.parent
PLOTS = sorted((ROOT / "docs" / "results").glob("*.svg"))
SPACE = "{http://www.w3.org/2000/svg}"


def effect(label, difference, half, verdict="not resolved"):
    ends = (difference - half, difference + half)
    alone = (difference - half / 2, difference + half / 2)
    return Effect(label, difference, *ends, *alone, verdict)


def drawn(effects):
    text = forest_plot.svg([Panel("a title", effects)], "question", "told")
    return ElementTree.fromstring(text)


def line(path):
    start, _, end = re.fullmatch(r"M(\S+) (\d+)H(\S+)", path.get("d")).groups()
    return float(start), float(end)


def test_points_and_intervals_are_where_the_axis_says():
    root = drawn([effect("a", 0.2, 0.1, "worse"), effect("b", -0.1, 0.3)])
    ticks = {
        float(text.text): float(text.get("x"))
        for text in root.findall(SPACE + "text")
        if text.get("class") == "m q"
    }
    (zero,) = (p for p in root.findall(SPACE + "path") if p.get("class") == "z")
    assert zero.get("d").startswith(f"M{ticks[0.0]:.1f} ")
    scale = (ticks[0.2] - ticks[0.0]) / 0.2
    circles = root.findall(SPACE + "circle")
    for circle, difference, kind in zip(circles, (0.2, -0.1), "wn", strict=True):
        assert float(circle.get("cx")) == pytest.approx(ticks[0.0] + scale * difference, abs=0.2)
        assert circle.get("class") == kind
    lines = {p.get("class"): line(p) for p in root.findall(SPACE + "path") if "H" in p.get("d")}
    for kind, (low, high) in {"w t": (0.1, 0.3), "w k": (0.15, 0.25), "n t": (-0.4, 0.2)}.items():
        expected = [ticks[0.0] + scale * end for end in (low, high)]
        assert lines[kind] == pytest.approx(expected, abs=0.2)


def test_seeds_are_ticks_at_their_differences():
    root = drawn([effect("a", 0.2, 0.1)._replace(seeds=(0.15, 0.25)), effect("b", 0.1, 0.1)])
    ticks = [p.get("d") for p in root.findall(SPACE + "path") if p.get("class") == "s"]
    circle = float(root.findall(SPACE + "circle")[0].get("cx"))
    left, right = (float(re.match(r"M(\S+) ", tick)[1]) for tick in ticks)
    assert left < circle < right
    assert (left + right) / 2 == pytest.approx(circle, abs=0.2)


def test_the_style_reaches_nothing_else_on_a_page():
    text = forest_plot.svg([Panel("a title", [effect("a", 0.2, 0.1)])], "question", "told")
    style = re.search("<style>(.*)</style>", text, re.DOTALL)[1]
    style = re.sub(r"@media[^{]*\{(.*)\}", r"\1", style, flags=re.DOTALL)
    selectors = re.findall(r"([^{}]+)\{", style)
    assert len(selectors) > 15
    assert all(one.startswith(".f ") for part in selectors for one in part.strip().split(","))
    assert 'class="f"' in text


def test_what_lies_far_outside_ends_in_an_arrow():
    root = drawn([effect("a", 0.01, 0.02), effect("b", 0.02, 0.02), effect("far", 5.0, 1.0)])
    arrows = [p for p in root.findall(SPACE + "path") if p.get("d").endswith("z")]
    assert len(arrows) == 1
    assert len(root.findall(SPACE + "circle")) == 2
    assert not [p for p in drawn([effect("a", 1.0, 0.2)]).iter() if "z" in p.get("d", "")[-1:]]


def test_a_single_seed_and_a_difference_of_nothing_can_be_drawn():
    one = Effect("one", 0.1, -math.inf, math.inf, -math.inf, math.inf, "not resolved")
    root = drawn([one, Effect("same", 0.0, 0.0, 0.0, 0.0, 0.0, "not resolved")])
    assert len(root.findall(SPACE + "circle")) == 2
    assert "unbounded" in ElementTree.tostring(root, "unicode")
    assert len(drawn([Effect("same", 0.0, 0, 0, 0, 0, "not resolved")])) > 5


def test_names_are_escaped():
    root = drawn([effect("a<b>&c", 0.1, 0.1)])
    assert "a<b>&c" in [text.text for text in root.findall(SPACE + "text")]


@pytest.mark.parametrize("path", PLOTS, ids=lambda path: path.stem)
def test_a_committed_plot_is_small_named_and_without_overlaps(path):
    content = path.read_text("utf-8")
    assert len(content.encode()) < 15_000
    root = ElementTree.fromstring(content)
    assert root.get("role") == "img"
    assert root.find(SPACE + "title").text.endswith("?")
    assert len(root.find(SPACE + "desc").text) > 40
    assert "prefers-color-scheme:dark" in content
    assert "href" not in content
    rows = {}
    for text in root.findall(SPACE + "text"):
        size, kinds = 6.7 * len(text.text), (text.get("class") or "").split()
        left = float(text.get("x")) - size * (1 if "e" in kinds else 0.5 if "m" in kinds else 0)
        rows.setdefault(text.get("y"), []).append((left, left + size))
    for found in rows.values():
        found.sort()
        assert found[0][0] >= 0
        assert found[-1][1] <= float(root.get("width"))
        for one, other in itertools.pairwise(found):
            assert one[1] <= other[0]


def test_there_are_plots():
    assert len(PLOTS) >= 8
