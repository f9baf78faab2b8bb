"""Charts put their numbers where the axes say, and stay well-formed whatever the names."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from launch import charts
from launch.charts import HeatRow, Line

HOSTILE = "</svg><script>alert('x')</script>&\""


def parsed(svg):
    return ElementTree.fromstring(svg)


def labels(root, anchor):
    """Text of an anchor -> (x, y)."""
    return {
        e.text: (float(e.get("x")), float(e.get("y")))
        for e in root.iter("text")
        if e.get("text-anchor") == anchor
    }


def marks(root):
    """What is shown of each point -> (x, y)."""
    found = {}
    for e in root.iter("path"):
        for note in e.iter("title"):
            x, y = re.fullmatch(r"translate\((.*) (.*)\)", e.get("transform")).groups()
            found[note.text] = (float(x), float(y))
    return found


@pytest.mark.parametrize("values", [(0.001, 0.03, 0.9), (0.4, 0.5, 0.61), (-0.01, 0.0, 0.02)])
def test_a_point_is_where_the_ticks_say(values):
    x = (2.5, 4.0, 8.5)
    line = Line("gptq", list(zip(x, values, strict=True)), [str(v) for v in values])
    root = parsed(charts.lines([line], "bits", "loss"))
    log = values[0] == 0.001
    assert any(text.endswith("logarithmic") for text in labels(root, "start")) == log
    place = np.log10 if log else np.asarray
    # The last label is not a tick, but that of the axis.
    heights = [(float(text), y - 4) for text, (_, y) in labels(root, "end").items()]
    across = [(float(t), at) for t, (at, _) in labels(root, "middle").items() if t != "bits"]
    assert len(heights) >= 3
    assert len(across) >= 3
    assert min(t for t, _ in heights) <= min(values)
    assert max(t for t, _ in heights) >= max(values)
    slope, start = np.polyfit(*zip(*[(place(t), y) for t, y in heights], strict=True), 1)
    slope_x, start_x = np.polyfit(*zip(*across, strict=True), 1)
    for bits, value in zip(x, values, strict=True):
        at = marks(root)[str(value)]
        np.testing.assert_allclose(
            at, (slope_x * bits + start_x, slope * place(value) + start), atol=0.2
        )
    assert slope < 0 < slope_x


def test_lines_differ_by_colour_mark_and_dashes():
    lines = [Line(f"line {i}", [(1, 2), (3, 4)], ["", ""]) for i in range(4)]
    root = parsed(charts.lines(lines, "x", "y"))
    drawn = [e for e in root.iter("path") if e.get("stroke")]
    assert len({(e.get("stroke"), e.get("stroke-dasharray")) for e in drawn}) == 4
    assert len({e.get("d") for e in root.iter("path") if e.get("transform")}) == 4


def test_equal_values_and_a_single_point_are_shown():
    for points in ([(4.0, 0.5)], [(4.0, 0.5), (4.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)]):
        svg = charts.lines([Line("a", points, ["n"] * len(points))], "x", "y")
        assert "nan" not in svg
        assert "inf" not in svg


def test_a_heat_map_is_darker_for_more_and_empty_for_nothing():
    rows = [
        HeatRow("up", [1e-4, 1e-3, 1e-2, 0.0], ["a", "b", "c", "d"]),
        HeatRow("head", [1e-3], ["e"]),
    ]
    root = parsed(charts.heat_map(rows, 4, "layer", "error"))
    cells = {e.find("title").text: e for e in root.iter("rect") if e.find("title") is not None}
    share = {n: re.search(r"/ ([\d.]+)\)", e.get("style")) for n, e in cells.items()}
    assert [float(share[n][1]) for n in "abce"] == [0.08, 0.54, 1.0, 0.54]
    assert share["d"] is None
    assert float(cells["e"].get("width")) == 4 * float(cells["a"].get("width"))
    text = [e.text for e in root.iter("text")]
    assert "0.0001" in text
    assert "0.01  error, logarithmic" in text
    assert all(str(i) in text for i in range(4))


def bars(path):
    """(x, length) of the bars of a path."""
    found = re.findall(r"M([-\d.]+) [-\d.]+(?:h[-\d.]+)?v([-\d.]+)", path)
    return [(float(x), float(size)) for x, size in found]


def test_bars_are_as_long_as_their_counts():
    edges, counts = np.linspace(-6, 6, 5), np.array([1, 4, 0, 2])
    values, used = np.array([-3.0, np.nan, 0.0, 9.0]), np.array([5, 0, 10, 7])
    root = parsed(charts.weights_and_codes(edges, counts, values, used, "rms"))
    weights, codes, _ = (e.get("d") for e in root.iter("path"))
    lengths = [-size for _, size in bars(weights)]
    np.testing.assert_allclose(lengths, [17.5, 70, 35], atol=0.01)
    (low, short), (zero, long) = bars(codes)  # the third is beyond the edges
    assert (short, long) == (20, 40)
    np.testing.assert_allclose(zero - low, 228 / 4, atol=0.02)
    scales = parsed(charts.histogram(np.array([-5.0, -4, -3]), np.array([3, 1]), "log2"))
    assert [-size for _, size in bars(next(scales.iter("path")).get("d"))] == [36, 12]
    assert {"-5", "-3", "log2"} <= {e.text for e in scales.iter("text")}


def test_names_are_text():
    svgs = [
        charts.lines([Line(HOSTILE, [(1, 1)], [HOSTILE])], HOSTILE, HOSTILE),
        charts.heat_map([HeatRow(HOSTILE, [1.0, 2.0], [HOSTILE] * 2)], 2, HOSTILE, HOSTILE),
        charts.histogram(np.array([0.0, 1.0]), np.array([1]), HOSTILE),
    ]
    for svg in svgs:
        assert "<script" not in svg
        assert HOSTILE in [e.text for e in parsed(svg).iter("text")]
