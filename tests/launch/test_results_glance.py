"""The verdicts at the top of docs/results.md are those of the tables below them."""

import re
from pathlib import Path

import pytest

from launch import records, results
from lm.studies import outcomes

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def text():
    return (ROOT / "docs" / "results.md").read_text()


def test_the_committed_page_is_that_of_its_files(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert text == results.build(Path("docs/results"))


def test_verdicts_at_a_glance_agree_with_the_tables(text):
    front, _, rest = text.partition("## Verdicts at a glance")[2].partition("\n## ")
    lines = dict(re.findall(r"^- .*? \(`(\w+)`\): (.*)$", front, re.MULTILINE))
    tables = sorted(path.stem for path in (ROOT / "docs" / "results").glob("*.csv"))
    assert sorted(lines) == tables
    shown = re.findall(
        r"^\| (\S+) \| [^|]* \| [^|]* \| \d+ \| (\S+) \| (\S+ to \S+) \| ([\w ]+)",
        rest,
        re.MULTILINE,
    )
    assert len(shown) > 40
    for name, difference, interval, _ in shown:
        assert any(f"{name} {difference} ({interval})" in line for line in lines.values())
    for name, line in lines.items():
        rows = records.read_csv(ROOT / "docs" / "results" / f"{name}.csv")
        found = [one for one in outcomes.outcomes(rows) if one.comparison]
        resolved = [one for one in found if one.comparison.verdict != "not resolved"]
        assert line.startswith(f"{len(resolved)} of {len(found)} resolved.")
        undecided = line.partition("not resolved: ")[2]
        for one in found:
            c = one.comparison
            item = f"{one.variant} {c.difference:+.4f} ({c.low:+.4f} to {c.high:+.4f})"
            assert item in line
            assert (item in undecided) == (c.verdict == "not resolved")
            if c.verdict != "not resolved":
                group = re.search(rf"{c.verdict} than [^:]*: (.*?)(?:;|$)", line)[1]
                assert item in group
