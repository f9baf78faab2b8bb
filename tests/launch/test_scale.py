"""The table of what fits where: what the command writes, and that the docs have it."""

import json
from pathlib import Path

import pytest

from launch import scale

DOCS = Path(__file__).parent.parent.parent / "docs"
SIZES = ["125m", "350m", "1b3", "7b", "70b"]


def table(text):
    """The rows of a page's table."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ][2:]


def test_the_page_is_what_the_command_writes_and_has_all_sizes():
    known = scale.load(DOCS / "scale.json")
    text = (DOCS / "scale.md").read_text()
    assert text == scale.page(known)
    found = table(text)
    assert [row[0] for row in found] == [size for size in SIZES for _ in range(3)]
    assert [row[1].partition(":")[0] for row in found] == 5 * ["v5e", "v5p", "8 x H100"]
    assert all(row[6] in ("yes", "no", "may", "not examined") for row in found)
    # The smallest and the two largest have been compiled for a slice, and fit there.
    for size in ("125m", "7b", "70b"):
        rows = [row for row in found if row[0] == size]
        assert any(row[6] == "yes" and row[8] for row in rows)
    # Negative control: a page of other figures is another one.
    known["7b v5p"]["compiled"]["memory"]["total"] *= 2
    assert scale.page(known) != text


def test_a_row_of_formulas_is_examined_and_then_known(monkeypatch):
    everything = scale.rows()
    (row,) = (row for row in everything if scale.name(row) == "1b3 h100")
    monkeypatch.setattr(scale, "rows", lambda: [row])
    assert list(scale.pending({})) == [row]
    record = json.loads(json.dumps(scale.examine(row)))
    # AdamW's three numbers and a gradient a parameter, and the input of 24 layers.
    numbers = 4 * 4 * record["parameters"] / 8
    inputs = 24 * (512 // 4 // 8) * 2048 * 2048 * 2
    assert record["bytes"] == pytest.approx(numbers + inputs, rel=0.01)
    assert list(scale.pending({"1b3 h100": record})) == []
    (cells,) = table(scale.page({"1b3 h100": record}))
    assert cells[:2] == ["1b3", "8 x H100"]
    assert cells[4].startswith("at least ")
    assert cells[6] == "may"
    other = record | {"of": record["of"] | {"config": "another"}}
    assert list(scale.pending({"1b3 h100": other})) == [row]


def test_what_is_cheap_comes_first_and_what_is_not_known_is_said(monkeypatch):
    monkeypatch.setattr(scale, "identity", lambda row: None if row.hardware == "v5e" else {})
    waiting = list(scale.pending({}))
    assert [row.hardware for row in waiting] == 5 * ["h100"] + 5 * ["v5p"]
    assert all(row[6] == "not examined" for row in table(scale.page({})))


def test_a_chip_that_is_too_small_is_said():
    row = scale.Row("70b", "v5e", "v5e:16x16")
    compiled = {"seconds": 70.0, "fits": False, "memory": None, "estimate": None}
    record = {"mesh": {"fsdp": 256}, "accumulation": 4, "memory": 2**34, "bytes": None}
    record["cpu_seconds"] = 50.0
    cells = scale._cells(row, record | {"compiled": compiled})
    assert cells[4:] == ["more than it has", "", "no", "", "50 s"]
