"""Numbers that a page of results quotes from its tables, so that prose and table cannot differ.

A source of a page holds them between `${` and `}`:

    codes                              the table of the study codes
    codes/binary|worse                 its verdict on a variant, with difference and interval
    codes/binary:+.4f                  its difference to the baseline, in a format of Python
    codes/binary - affine:+.4f         the difference of two variants
    codes/deviation of learned:.2f     the standard deviation over seeds of a variant
    scaling/laws                       the scaling laws fitted to the runs, a table
    scaling/error of Chinchilla:.1%    mean relative error of a law on the runs that it was not
                                       fitted to, those of the most FLOPs
    policy_methods/grpo/solved         a cell of a printed table
    policy_methods/dapo/gained|better  the verdict on a cell of gains, with its interval

The word behind `|` is what the sentence says; if the table says something else, it is refused.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from launch import result_tables
from launch.forest_plot import Effect
from launch.result_tables import Printed, Study, Tables
from lm.errors import InputError

_PLACE = re.compile(r"\$\{([^{}]+)\}")


class Quotation(NamedTuple):
    """What stands on the page for a place of its source.

    Attributes:
      text: on the page.
      short: in the overview, without the numbers that have a column of their own there.
      source: how the text follows from the runs, in words; "" for a table.
      effect: of a verdict; None for other quotations.
    """

    text: str
    short: str
    source: str = ""
    effect: Effect | None = None


def places(text: str) -> list[str]:
    """What stands between `${` and `}`, in the order of the text."""
    return [" ".join(found.split()) for found in _PLACE.findall(text)]


def replace(text: str, replacement: Callable[[str], str]) -> str:
    """The text with a replacement for every place."""
    return _PLACE.sub(lambda found: replacement(" ".join(found[1].split())), text)


def quote(place: str, tables: Tables) -> Quotation:
    """What stands for a place.

    Raises:
      InputError: there is no such table, variant, row or column, the format is none, or the verdict
        is another one.
    """
    asked, _, verdict = place.partition("|")
    name, _, inner = asked.partition("/")
    if name not in tables:
        raise InputError(f"${{{place}}}: there is no table {name}; valid: {', '.join(tables)}")
    table = tables[name]
    if not inner:
        return Quotation(table.markdown(), "")
    if inner == "laws" and isinstance(table, Study):
        return Quotation(table.law_table(), "")
    if not verdict:
        return _cell(table, inner) if isinstance(table, Printed) else _number(table, inner, place)
    effect, source = _effect(table, inner)
    if effect.verdict != verdict:
        raise InputError(f"${{{place}}}: the table says {effect.verdict}")
    unit = f" {effect.unit}" if effect.unit else ""
    text = f"{verdict} ({effect.number()}{unit}, 95% interval {effect.interval()})"
    return Quotation(text, verdict, source, effect)


def _effect(table: Study | Printed, inner: str) -> tuple[Effect, str]:
    """The effect that a verdict is about, and where it comes from."""
    if isinstance(table, Printed):
        row, _, column = inner.rpartition("/")
        table.cell(row, column)
        found, count = table.effects(column), len(table.effects(column))
        source = (
            f"{table.path}: row {row}, column {column}: {table.cell(row, column)} as printed; "
            f"interval widened for {count} comparison{'s' * (count > 1)}"
        )
    else:
        row, found = inner, table.effects()
        source = _paired(table, inner, table.baseline)
        source += f"; interval: Student's t, {len(found)} comparisons"
    chosen = [one for one in found if one.label == row]
    if not chosen:
        valid = ", ".join(one.label for one in found)
        raise InputError(f"{table.path}: {row!r} is not compared; valid: {valid}")
    return chosen[0], source


def _cell(table: Printed, inner: str) -> Quotation:
    row, _, column = inner.rpartition("/")
    text = table.cell(row, column)
    return Quotation(text, text, f"{table.path}: row {row}, column {column}, as printed")


def _number(study: Study, inner: str, place: str) -> Quotation:
    asked, _, form = inner.rpartition(":")
    if not asked or not re.fullmatch(r"\+?\.\d[f%]", form):
        raise InputError(f"${{{place}}}: add |VERDICT, or a format such as :+.4f")
    if asked.startswith("deviation of "):
        variant = asked.removeprefix("deviation of ")
        value = result_tables.deviation(study, variant)
        seeds = _listed(study.scores(variant), "")
        source = f"{study.path}: standard deviation of bits/byte of {variant}: {seeds}"
    elif asked.startswith("error of "):
        value, source = _law_error(study, asked.removeprefix("error of "))
    else:
        variant, _, other = asked.partition(" - ")
        other = other or study.baseline
        found = result_tables.differences(study, variant, other)
        value = sum(found.values()) / len(found)
        source = _paired(study, variant, other)
    text = f"{value:{form}}"
    return Quotation(text, text, source)


def _law_error(study: Study, law: str) -> tuple[float, str]:
    fits = study.fits()
    if law not in fits:
        raise InputError(f"{study.path}: there is no law {law!r}; valid: {', '.join(fits)}")
    source = (
        f"{study.path}: {fits[law].law.name}: mean relative error on the runs of the most FLOPs"
    )
    return fits[law].held_out_error, source


def _paired(study: Study, variant: str, other: str) -> str:
    """How a difference follows from the runs."""
    found = _listed(result_tables.differences(study, variant, other), "+")
    return f"{study.path}: bits/byte of {variant} minus {other}: mean of {found}"


def _listed(by_seed: dict[int, float], sign: str) -> str:
    return ", ".join(f"{value:{sign}.4f} (seed {seed})" for seed, value in by_seed.items())
