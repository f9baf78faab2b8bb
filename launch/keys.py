"""All keys of a config, as text, JSON or Markdown."""

from collections.abc import Iterable

from configs import base
from lm import strict_json

# Section, name, default as it is written in Python, meaning.
Key = tuple[str, str, str, str]


def listed(prefix: str = "") -> list[Key]:
    """Every key, or those with a full name that begins with `prefix`."""
    return [
        (section, name, repr(default), meaning)
        for section, name, (default, meaning) in base.entries()
        if f"{section}.{name}".startswith(prefix)
    ]


def as_text(found: Iterable[Key]) -> str:
    """A line a key: its full name, its default and what it means."""
    rows = [(f"{section}.{name}", default, meaning) for section, name, default, meaning in found]
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return "\n".join(
        f"{name:{widths[0]}}  {default:{widths[1]}}  {meaning}" for name, default, meaning in rows
    )


def as_json(found: Iterable[Key]) -> str:
    """{full name: {"default": ..., "meaning": ...}}."""
    wanted = {f"{section}.{name}" for section, name, *_ in found}
    return strict_json.dumps(
        {
            f"{section}.{name}": {"default": default, "meaning": meaning}
            for section, name, (default, meaning) in base.entries()
            if f"{section}.{name}" in wanted
        }
    )


def as_markdown(found: Iterable[Key]) -> str:
    """A table a section, for docs/configs.md."""
    lines = [
        "# Configs",
        "",
        "Every key of a run, its default and what it means, as `launch.plan --keys` prints them.",
        "A key is changed in an experiment file or as `--config.section.key=value`. This page is",
        "made by `python -m launch.plan --keys --markdown > docs/configs.md`.",
    ]
    section = ""
    for its_section, name, default, meaning in found:
        if its_section != section:
            section = its_section
            lines += ["", f"## {section}", "", "| key | default | meaning |", "|---|---|---|"]
        meaning = meaning.replace("|", "\\|")
        lines.append(f"| `{name}` | `{default}` | {meaning} |")
    return "\n".join(lines)
