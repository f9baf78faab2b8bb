"""The record of benchmarks/gpu.py as text."""

import math
from typing import Any

from launch.command import table

# Goals of a row: what it is, section, row, figure, bound, and whether the figure may be larger.
_GOALS = (
    ("MFU of 350m", "step 350m", "mfu", 0.5, max),
    ("MFU of 1.3b", "step 1.3b", "mfu", 0.5, max),
    ("loss in blocks, time of dense", "loss", "seconds_of_dense", 1.1, min),
)

# Figures of rows that are columns: name, head of the column, factor, format.
_COLUMNS = (
    ("seconds", "ms", 1e3, ".2f"),
    ("lower", "quartile", 1e3, ".2f"),
    ("upper", "quartile", 1e3, ".2f"),
    ("tokens_per_second", "tokens/s", 1, ",.0f"),
    ("mfu", "MFU", 1, ".3f"),
    ("fraction", "of limit", 1, ".3f"),
    ("seconds_of_dense", "of dense", 1, ".2f"),
    ("seconds_of_plain", "of plain", 1, ".2f"),
    ("temporary_bytes", "temp. MiB", 2**-20, ",.0f"),
    ("temporary_bytes_of_dense", "of dense", 1, ".4f"),
    ("argument_bytes", "arguments MiB", 2**-20, ",.0f"),
    ("process_peak_bytes", "process peak MiB", 2**-20, ",.0f"),
    ("compile_seconds", "compile s", 1, ".1f"),
    ("cudnn_calls", "cuDNN calls", 1, ".0f"),
    ("first_loss", "first loss", 1, ".3f"),
    ("last_loss", "last loss", 1, ".3f"),
    ("bfloat16_seconds", "bfloat16 ms", 1e3, ".3f"),
    ("fp8_seconds", "fp8 ms", 1e3, ".3f"),
    ("fp8_of_bfloat16", "of bfloat16", 1, ".2f"),
    ("fp8_with_casts_seconds", "with casts ms", 1e3, ".3f"),
    ("fp8_with_casts_of_bfloat16", "of bfloat16", 1, ".2f"),
    ("relative_error", "relative error", 1, ".4f"),
)


def lines(record: dict[str, Any]) -> list[str]:
    """Header, goals, then a table for every section that has been run so far."""
    packages = ", ".join(f"{k} {v or 'missing'}" for k, v in record["packages"].items())
    kind = "toy sizes on CPU: no figure of a GPU" if record["toy"] else "one GPU"
    found = [
        f"benchmarks/gpu.py, {record['date']}, commit {record['commit']}, {kind}",
        f"Python {record['python']}; {packages}",
        f"installed for this run: {', '.join(record['installed']) or 'nothing'}",
        *_goals(record),
    ]
    for name, section in record["sections"].items():
        found += ["", f"== {name}, {section['seconds']:.0f} s"]
        found += _section(section["rows"])
        if section["error"]:
            found += ["the section ended early:", *_indented(section["error"])]
    return found


def _goals(record: dict[str, Any]) -> list[str]:
    found = []
    for what, section, figure, bound, best in _GOALS:
        rows = record["sections"].get(section, {}).get("rows", {})
        values = {
            n: r[figure] for n, r in rows.items() if _is_number(r.get(figure)) and n != "dense"
        }
        if record["toy"] or not values:
            found.append(
                f"goal: {what} {'at least' if best is max else 'at most'} {bound}: unknown"
            )
            continue
        name = best(values, key=values.get)
        met = best(values[name], bound) == values[name]
        said = f"{'met' if met else 'missed'} with {values[name]:.3f} ({name})"
        found.append(f"goal: {what} {'at least' if best is max else 'at most'} {bound}: {said}")
    return found


def _section(rows: dict[str, Any]) -> list[str]:
    figures = {name: row for name, row in rows.items() if isinstance(row, dict)}
    used = [c for c in _COLUMNS if any(_is_number(row.get(c[0])) for row in figures.values())]
    cells = [
        [name, *(_cell(row.get(key), factor, form) for key, _, factor, form in used)]
        for name, row in figures.items()
        if any(_is_number(row.get(key)) for key, *_ in used)
    ]
    found = table(["", *(head for _, head, *_ in used)], cells) if cells else []
    for name, row in figures.items():
        found += _rest(name, row)
    return found


def _rest(name: str, row: dict[str, Any]) -> list[str]:
    """What of a row is no column of the table."""
    found = []
    if isinstance(row.get("error"), str):
        found += [f"{name} failed:", *_indented(row["error"])]
    if "left_out" in row:
        found.append(f"{name}: {row['left_out']}")
    shown = ("platform", "kind", "devices", "capability", "client", "driver", "cores")
    shown += ("measured_flops", "bandwidth", "peak_flops", "peak_is", "passed", "failed", "skipped")
    found += [f"{key}: {row[key]}" for key in shown if key in row]
    found += _indented("\n".join(row.get("failures", [])))
    found += [
        f"{name}, {key.removesuffix('_calls')}: {', '.join(row[key]) or 'no library call'}"
        for key in ("bfloat16_calls", "fp8_calls", "fp8_with_casts_calls")
        if key in row
    ]
    if "kernels" in row:
        found += _kernels(row)
    return found


def _kernels(row: dict[str, Any]) -> list[str]:
    found = [
        f"{row['steps']} steps in {row['seconds']:.3f} s; kernels {row['device_seconds']:.3f} s, "
        f"{row['busy_share']:.2f} of the time between the first and the last",
        *(f"  {kind}: {seconds:.4f} s" for kind, seconds in row["kinds"].items()),
    ]
    cells = [
        [k["name"][:90], f"{k['count']}", f"{1e3 * k['seconds']:.2f}", f"{k['share']:.3f}"]
        for k in row["kernels"]
    ]
    return found + table(["kernel", "count", "ms", "share"], cells)


def _cell(value: Any, factor: float, form: str) -> str:
    return format(value * factor, form) if _is_number(value) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
