"""docs/methods.md: tables of all methods, made from the registries and the docstrings."""

import inspect
import re
from collections.abc import Callable, Mapping

from lm.model.embeddings import INTERFACES
from objectives import OBJECTIVES
from objectives.losses import LOSSES
from objectives.policy import POLICY
from objectives.preference import PREFERENCE
from objectives.preference.logic import FORMS
from objectives.quantization import QUANTIZERS
from objectives.weighting import WEIGHTINGS

_TABLES: tuple[tuple[str, str, Mapping[str, Callable]], ...] = (
    ("Objectives", "`objective.name`", OBJECTIVES),
    ("Weightings", "`objective.weighting`", WEIGHTINGS),
    ("Losses", "`objective.loss`", LOSSES),
    ("Objectives of preferences", "`objective.name`", PREFERENCE),
    ("Policy gradients", "`objective.name`", POLICY),
    ("Quantizers", "`quantization.quantizer`", QUANTIZERS),
    ("Token interfaces", "`model.embedding`", INTERFACES),
)


def as_markdown() -> str:
    """The page: of each method its name, the first sentence of its docstring, papers and file."""
    lines = [
        "# Methods",
        "",
        "Each method is a function in a file of its own; its docstring has the equations, the",
        "constants and which of them are unconfirmed. This page is made from the docstrings, by",
        "`python -m launch.plan --methods > docs/methods.md`. More on",
        "[weightings](weightings.md), [losses](losses.md), [preferences](preference.md),",
        "[policy gradients](policy.md), [quantization](compression.md) and",
        "[token interfaces](interfaces.md).",
    ]
    for title, key, registry in _TABLES:
        lines += ["", f"## {title}", "", f"Names of {key}.", ""]
        lines += ["| name | what it is | arXiv | file |", "|---|---|---|---|"]
        for name, method in registry.items():
            doc = inspect.getdoc(method) or ""
            module = inspect.unwrap(method).__module__.replace(".", "/")
            lines.append(f"| `{name}` | {_first(doc)} | {_papers(doc)} | `{module}.py` |")
    return "\n".join([*lines, *_logic()])


def _logic() -> list[str]:
    """The table of the symbolic forms of the losses of preferences."""
    lines = [
        "",
        "## The logic of preferences",
        "",
        "What losses of pairs and of single answers say; `objectives/preference/logic.py` explains",
        "the symbols. The margin is log a - log b.",
        "",
        "| objective | statement | a agrees | b contradicts | loss |",
        "|---|---|---|---|---|",
    ]
    for name, form in FORMS.items():
        agrees, contradicts = f"`{form.agrees}`", f"`{form.contradicts}`"
        cells = f"`{name}`", f"`{form.statement}`", agrees, contradicts, f"`{form.loss}`"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _first(doc: str) -> str:
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return paragraph.replace("|", "\\|")


def _papers(doc: str) -> str:
    return ", ".join(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", doc)))
