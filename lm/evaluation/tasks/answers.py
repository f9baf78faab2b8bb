"""What counts of a written answer: filters such as a regular expression, and exact match.

As in lm_eval 0.4.13, for answers that are drawn once.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lm.errors import InputError, shown
from lm.evaluation.tasks.time_limit import limited

# Name -> functions that an answer passes through, in order.
Filters = Mapping[str, Sequence[Callable[[str], str]]]

NO_FILTERS: Filters = {"none": ()}

_LONGEST_PATTERN = 2000

# Filters without arguments. `take_first` takes the one answer that there is.
_PLAIN: dict[str, Callable[[str], str]] = {
    "take_first": str,
    "remove_whitespace": str.strip,
    "lowercase": str.lower,
    "uppercase": str.upper,
}


class Matching(NamedTuple):
    """How exact_match compares: what it takes out of both texts first."""

    regexes_to_ignore: tuple[re.Pattern, ...] = ()
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False


def read_filters(given: Any, written: bool, file: str) -> Filters:
    """The filters of filter_list; None is none.

    Args:
      given: the value of the key.
      written: whether the answers are texts; others pass through take_first alone.
      file: of the task.

    Raises:
      InputError: not known, or not complete.
    """
    if given is None:
        return NO_FILTERS
    found = {}
    for entry in given:
        steps = entry.get("filter") if isinstance(entry, dict) else None
        if not isinstance(steps, list) or not isinstance(entry.get("name"), str):
            raise InputError(f"{file}: filter_list: an entry must have a name and a list filter")
        found[entry["name"]] = tuple(_filter(step, written, file) for step in steps)
    if not found:
        raise InputError(f"{file}: filter_list is empty; leave it out")
    return found


def _filter(step: Any, written: bool, file: str) -> Callable[[str], str]:
    options = dict(step) if isinstance(step, dict) else {}
    name = options.pop("function", None)
    valid = (*_PLAIN, "regex") if written else ("take_first",)
    if name not in valid:
        raise InputError(
            f"{file}: filter_list: function={shown(name)} is not one of: {', '.join(valid)}"
        )
    if name != "regex":
        if options:
            raise InputError(f"{file}: filter_list: {name} has no {shown(next(iter(options)))}")
        return _PLAIN[name]
    pattern = compiled(options.pop("regex_pattern", r"#### (\-?[0-9\.\,]+)"), file)
    group, fallback = options.pop("group_select", 0), options.pop("fallback", "[invalid]")
    if options or not isinstance(group, int) or not isinstance(fallback, str):
        raise InputError(
            f"{file}: filter_list: regex has a regex_pattern, a number group_select and a text "
            "fallback"
        )
    return lambda answer: _extracted(pattern, group, fallback, answer, file)


def compiled(pattern: Any, file: str) -> re.Pattern:
    """A regular expression of a file.

    Raises:
      InputError: it is none, or too long.
    """
    if not isinstance(pattern, str) or len(pattern) > _LONGEST_PATTERN:
        raise InputError(f"{file}: {shown(pattern)} is no regular expression that is used")
    try:
        with limited(f"{file}: the regular expression {shown(pattern)}"):
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{file}: {shown(pattern)}: no regular expression: {error}") from None


def _extracted(pattern: re.Pattern, group: int, fallback: str, answer: str, file: str) -> str:
    """The match of this number, its first group that is not empty where it has several."""
    with limited(f"{file}: the regular expression {shown(pattern.pattern)}"):
        matches = pattern.findall(answer)
    if not matches:
        return fallback
    try:
        match = matches[group]
    except IndexError:
        raise InputError(
            f"{file}: filter_list: group_select={group}, but {shown(answer)} has "
            f"{len(matches)} matches of {shown(pattern.pattern)}"
        ) from None
    if isinstance(match, tuple):
        match = next(filter(None, match), fallback)
    return match.strip()


def read_matching(given: Any, valid: Sequence[str], file: str) -> Matching:
    """Checks metric_list, and how its exact_match compares.

    Raises:
      InputError: a metric or an option that is not known.
    """
    found = Matching()
    for entry in given or ():
        name = entry.get("metric") if isinstance(entry, dict) else None
        if name not in valid:
            raise InputError(
                f"{file}: metric_list: metric={shown(name)} is not one of: {', '.join(valid)}"
            )
        rest = {k: v for k, v in entry.items() if k not in ("metric", "higher_is_better")}
        expected = "mean" if name.startswith(("acc", "exact")) else name
        if rest.pop("aggregation", expected) not in (expected, "weighted_perplexity"):
            raise InputError(f"{file}: metric_list: aggregation of {name} must be {expected}")
        known = Matching._fields if name == "exact_match" else ()
        if unknown := [key for key in rest if key not in known]:
            raise InputError(f"{file}: metric_list: {name} has no {shown(unknown[0])}")
        patterns = rest.pop("regexes_to_ignore", None) or []
        if not isinstance(patterns, list) or not all(isinstance(x, bool) for x in rest.values()):
            raise InputError(
                f"{file}: metric_list: regexes_to_ignore is a list, the others true or false"
            )
        if name == "exact_match":
            found = Matching(tuple(compiled(one, file) for one in patterns), **rest)
    return found


def matches(answer: str, target: str, how: Matching, file: str) -> bool:
    """Whether the two texts are equal, apart from what is ignored."""
    return _reduced(answer, how, file) == _reduced(target, how, file)


def _reduced(text: str, how: Matching, file: str) -> str:
    for pattern in how.regexes_to_ignore:
        with limited(f"{file}: the regular expression {shown(pattern.pattern)}"):
            text = pattern.sub("", text)
    if how.ignore_case:
        text = text.lower()
    if how.ignore_punctuation:
        text = text.translate(str.maketrans("", "", string.punctuation))
    if how.ignore_numbers:
        text = text.translate(str.maketrans("", "", string.digits))
    return text


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first of the texts that end it."""
    for stop in until:
        answer = answer.partition(stop)[0]
    return answer
