"""The pages of results and their plots, from the sources and tables of docs/results.

questions/NUMBER_NAME.md is the source of results/NAME.md and results/NAME.svg. Its first line is
the question; the paragraph below it is the answer, one sentence, and the first verdict in it is
the one of the overview. launch.quotations says what may stand in it; besides,

    ${plot NAME: TITLE; NAME/COLUMN: TITLE}     the plot, a panel for each table
    ${commands}                                 what makes the tables, and what traces them
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch import forest_plot, quotations, records, result_tables
from launch.forest_plot import Effect, Panel
from launch.quotations import Quotation
from launch.result_tables import Printed, Study, Tables
from lm.errors import InputError

SOURCES = "questions"
FRONT = "results.md"
_MADE = "<!-- Made by `python -m launch.results` from {}: do not edit. -->\n"
_VERDICTS = ("better", "worse", "not resolved")


class Source(NamedTuple):
    """A question.

    Attributes:
      path: of its file.
      name: of its page.
      question: its first line.
      answer: one sentence, with places.
      text: all of it.
    """

    path: Path
    name: str
    question: str
    answer: str
    text: str


def build(folder: Path) -> dict[str, str]:
    """All files, by their paths beside results.md.

    Args:
      folder: docs/results; its name is that of the folder of the pages.

    Raises:
      InputError: there is no source, one names something that is not there, or a table is on no
        page.
    """
    found = sources(folder)
    tables = result_tables.load(folder)
    files = {FRONT: _front(found, tables, folder.name)}
    for source in found:
        files[f"{folder.name}/{source.name}.md"] = _page(source, tables)
        files[f"{folder.name}/{source.name}.svg"] = _plot(source, tables)
    shown = {place for source in found for place in quotations.places(source.text)}
    if hidden := [table.path for name, table in tables.items() if name not in shown]:
        raise InputError(f"{hidden[0]} is on no page: a file of {folder / SOURCES} must name it")
    return files


def sources(folder: Path) -> list[Source]:
    """The questions of a folder in the order of their numbers.

    Raises:
      InputError: there is none, or one does not begin with a question and its answer.
    """
    paths = list((folder / SOURCES).glob("*.md"))
    for path in paths:
        if not re.fullmatch(r"\d+_\w+", path.stem):
            raise InputError(f"{path}: the name of a question is NUMBER_NAME.md")
    if not paths:
        raise InputError(f"{folder / SOURCES} has no question: no file NUMBER_NAME.md")
    return [_read(path) for path in sorted(paths, key=lambda path: int(path.stem.split("_")[0]))]


def _read(path: Path) -> Source:
    text = path.read_text("utf-8")
    head, _, rest = text.strip().partition("\n\n")
    answer = " ".join(rest.partition("\n\n")[0].split())
    if not head.startswith("# ") or not any("|" in one for one in quotations.places(answer)):
        raise InputError(
            f"{path}: begin with '# QUESTION' and an answer with ${{TABLE/ROW|VERDICT}}"
        )
    return Source(path, path.stem.partition("_")[2], head.removeprefix("# "), answer, text)


def quoted(source: Source, tables: Tables) -> list[tuple[str, Quotation]]:
    """The places of a source that are quotations, and what stands for them.

    Raises:
      InputError: with the path of the source.
    """
    return [
        (place, _quote(source, place, tables))
        for place in quotations.places(source.text)
        if not _is_built(place)
    ]


def used(source: Source, tables: Tables) -> list[Study | Printed]:
    """The tables of a page in their order, then those that its text only quotes."""
    found = [place for place, _ in quoted(source, tables)]
    names = [place.split("/")[0] for place in sorted(found, key=lambda place: "/" in place)]
    return [tables[name] for name in dict.fromkeys(names)]


def _is_built(place: str) -> bool:
    return place == "commands" or place.startswith("plot ")


def _quote(source: Source, place: str, tables: Tables) -> Quotation:
    try:
        return quotations.quote(place, tables)
    except InputError as error:
        raise InputError(f"{source.path}: {error}") from None


def _page(source: Source, tables: Tables) -> str:
    def filled(place: str) -> str:
        if place == "commands":
            return _commands(source, tables)
        if place.startswith("plot "):
            return _image(source, tables, "")
        return _quote(source, place, tables).text

    blocks = [_MADE.format(f"{SOURCES}/{source.path.name}").strip()]
    for block in re.split(r"\n{2,}", source.text.strip()):
        text = quotations.replace(block, filled)
        # A place that is alone makes a table, a plot or commands.
        alone = re.fullmatch(r"\$\{[^{}]*\}", block)
        blocks.append(text if text == block or alone else _wrapped(text))
    return "\n\n".join(blocks) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False
    )


def _commands(source: Source, tables: Tables) -> str:
    """What trains the studies of a page, what traces it, and how long the training took."""
    studies = [one for one in used(source, tables) if isinstance(one, Study)]
    if not studies:
        raise InputError(f"{source.path}: no study, so no ${{commands}}: write them down")
    rows = [row for one in studies for row in one.rows]
    # The speed is NaN where nothing was trained.
    trained = [row.tokens / row.tokens_per_second for row in rows if row.tokens_per_second > 0]
    lines = [one.command() for one in studies]
    lines.append(f"python -m launch.results --trace=docs/results/{source.name}.md")
    block = "\n".join(["```bash", *lines, "```"])
    took = records.duration(sum(trained))
    return f"{block}\n\nThe training of these {len(trained)} runs took {took} in all."


def panels(source: Source, tables: Tables) -> list[Panel]:
    """What the plot of a page shows.

    Raises:
      InputError: there is not one plot, or it names a table or column that is not there.
    """
    found = [place for place in quotations.places(source.text) if place.startswith("plot ")]
    if len(found) != 1:
        raise InputError(f"{source.path}: {len(found)} plots, not one ${{plot TABLE: TITLE; ...}}")
    asked = [part.partition(":") for part in found[0].removeprefix("plot ").split(";")]
    return [_panel(source, place.strip(), title.strip(), tables) for place, _, title in asked]


def _panel(source: Source, place: str, title: str, tables: Tables) -> Panel:
    name, _, column = place.partition("/")
    table = tables.get(name)
    if table is None or isinstance(table, Printed) != bool(column):
        raise InputError(f"{source.path}: the plot's {place} is no STUDY and no TABLE/COLUMN")
    if isinstance(table, Printed):
        return Panel(f"{title}; above 0 is better", table.effects(column))
    more = f"bits/byte minus {table.baseline}; below 0 is better"
    return Panel(": ".join(filter(None, [title, more])), table.effects())


def _plot(source: Source, tables: Tables) -> str:
    shown = panels(source, tables)
    return forest_plot.svg(shown, source.question, _described(shown))


def _described(shown: Sequence[Panel]) -> str:
    """What the plot shows, in words."""
    return " ".join(f"{one.title}. {_grouped(one.effects)}." for one in shown)


def _grouped(effects: Sequence[Effect]) -> str:
    parts = []
    for verdict in _VERDICTS:
        if names := [one.label for one in effects if one.verdict == verdict]:
            parts.append(f"{verdict[0].upper()}{verdict[1:]}: {', '.join(names)}")
    return ". ".join(parts)


def _counted(effects: Sequence[Effect]) -> str:
    verdicts = [one.verdict for one in effects]
    return ", ".join(f"{verdicts.count(one)} {one}" for one in _VERDICTS if one in verdicts)


def _image(source: Source, tables: Tables, folder: str) -> str:
    effects = [effect for panel in panels(source, tables) for effect in panel.effects]
    told = f"Differences with 95% intervals: {_counted(effects)}"
    return f"![{told}]({folder}{source.name}.svg)"


_FRONT = """# Results

What the methods of this repository did at a size that two CPU cores can do, negatives included: a
page for each question, with the answer, the tables, the plot, the commands, the claim of the paper
and what we read in it.

## Verdicts at a glance

The difference is that of the answer's first verdict. Its interval holds the true difference with
95%, together with those of all others of its table; *better* and *worse* are those without 0.

"""

_LEGEND = """## All comparisons

A row is a variant against the baseline of its panel. The point is the mean over seeds, the thick
line the 95% interval of this comparison alone; the thin line and the numbers are the interval
corrected for all comparisons of the panel, which the verdict follows. An arrow marks what lies
outside of the axis.
"""

_TRACES = """## Where the numbers come from

```bash
python -m launch.results
python -m launch.results --trace=docs/results.md
```

{}
"""

_TOLD = """The first command makes these pages: losses, differences and intervals of answers, plots
and readings are taken from the tables. The second one compares every number of every table with the
metrics of its run, which are in the .jsonl.gz file beside the CSV file of the table, and the pages
with the tables. For each number that a text quotes it prints the losses of the seeds that it is
made of. {}[Ablations](ablations.md#a-question-of-your-own) says how the intervals are made, and how
to add a question. What was measured of pretrained models, of memory and of speed is on the pages
[quantization](quantization.md), [scale](scale.md) and [speed](speed.md)."""


def _front(found: Sequence[Source], tables: Tables, folder: str) -> str:
    head = "| question | answer | difference (95% interval) | verdict | all comparisons |"
    lines = [head, "|---|---|---|---|---|"]
    plots = []
    for source in found:
        answers = [(p, _quote(source, p, tables)) for p in quotations.places(source.answer)]
        texts = dict(answers)
        main = next(one.effect for _, one in answers if one.effect)
        effects = [effect for panel in panels(source, tables) for effect in panel.effects]
        page, unit = f"{folder}/{source.name}.md", f" {main.unit}" if main.unit else ""
        cells = [
            f"[{source.question}]({page})",
            quotations.replace(source.answer, lambda place, texts=texts: texts[place].short),
            f"{main.number()}{unit} ({main.interval()})",
            main.verdict,
            _counted(effects),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        image = _image(source, tables, f"{folder}/")
        whole = quotations.replace(source.answer, lambda place, texts=texts: texts[place].text)
        plots.append(f"### {source.question}\n\n{_wrapped(whole)}\n\n[{image}]({page})\n")
    traces = _TRACES.format(_wrapped(_TOLD.format(_without_runs(tables))))
    made = _MADE.format(f"{folder}/{SOURCES}")
    table = "\n".join(lines) + "\n"
    return "\n".join([made, _FRONT + table, _LEGEND, *plots, traces])


def _without_runs(tables: Tables) -> str:
    printed = [
        f"`{name}`"
        for name, one in tables.items()
        if isinstance(one, Printed) and not one.runs.exists()
    ]
    if not printed:
        return ""
    return (
        f"The runs of {', '.join(printed)} are not kept: these tables are what a program of "
        "`benchmarks` printed. "
    )
