"""The table of launch.plan --profile: the times of a trace beside what they could be."""

import math

from launch import command
from lm import strict_json
from lm.planning import ahead, plan, profile, trace
from lm.planning.profile import Limits, Measured, Row, Work
from lm.training import experiment

# A smaller share of the step in operations that the program does not have is not reported.
_WORTH_SAYING = 0.01


def show(run: experiment.Experiment, topology: ahead.Topology | None) -> None:
    """Prints the times of the trace in --profile beside the estimate of a run.

    Raises:
      InputError: the trace, or what lies beside it, cannot be read.
    """
    folder = command.PROFILE.value
    measured = profile.measure(folder, command.NAME.value or None)
    limits = _limits(folder, run, topology)
    communication = None
    if topology:
        command.say(f"compiling the train step for {topology.name}; this may take minutes")
        compiled = ahead.compile_step(run, topology).estimate
        communication = compiled.communication_seconds if compiled else None
    rows = profile.compare(measured, profile.estimate(run, limits, communication), limits)
    if command.JSON.value:
        shown = measured._asdict()
        del shown["work"]
        traces = [str(path) for path in trace.find(folder)]
        record = {"traces": traces, "measured": shown, "limits": limits}
        record["rows"] = [{**row._asdict(), "ratio": row.ratio} for row in rows]
        print(strict_json.dumps(plan.as_dict(record)))
    else:
        print("\n".join(lines(measured, limits, rows, run.mesh.size)))


def lines(measured: Measured, limits: Limits, rows: list[Row], devices: int) -> list[str]:
    """The table of `profile.compare` and its summary, of a run on `devices` devices."""
    found = [
        f"{measured.steps} step{'s' * (measured.steps > 1)} on "
        f"{measured.devices} device{'s' * (measured.devices > 1)}; "
        f"peak and bandwidth: {limits.source}"
    ]
    if measured.program:
        found += [*_with_program(measured, limits, rows), *_summary(measured, limits)]
    else:
        found += [*_without_program(measured, rows), *_deviations(rows)]
    if measured.devices != devices:
        found.append(f"the estimate is of one of {devices} devices, see --devices")
    if limits.flops is None:
        found.append("no peak is known to estimate by: set --config.train.peak_flops")
    if silent := [row.name for row in rows[1:] if row.measured is None]:
        found.append(f"the trace names no operation as of: {', '.join(silent)}")
    return found


def _limits(folder: str, run: experiment.Experiment, topology: ahead.Topology | None) -> Limits:
    if found := profile.machine_limits(folder, run.config.model.dtype):
        return found
    peak = run.config.train.peak_flops
    source = "of --topology" if topology else "train.peak_flops" if peak else "unknown"
    return Limits(topology.peak_flops if topology else peak or None, None, source)


def digits(number: float | None) -> str:
    """A number with three digits and no exponent, as 8,890 or 17.1 or 0.426; "" for None."""
    if number is None:
        return ""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def _ms(seconds: float | None) -> str:
    return digits(None if seconds is None else 1e3 * seconds)


def _share(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.1%}" if part and whole else ""


def _without_program(measured: Measured, rows: list[Row]) -> list[str]:
    named = sum(measured.seconds.values())
    cells = [
        [
            row.name,
            _ms(row.measured),
            _share(row.measured, named) if i else "",
            _ms(row.estimate),
            digits(row.ratio),
        ]
        for i, row in enumerate(rows)
    ]
    head = ["", "ms measured", "of operations", "ms estimated", "measured / estimated"]
    return command.table(head, cells)


def _with_program(measured: Measured, limits: Limits, rows: list[Row]) -> list[str]:
    whole = sum(measured.side_by_side.values())
    cells = []
    for i, row in enumerate(rows):
        cells.append([row.name, _ms(row.measured), _share(row.measured, whole) if i else ""])
        cells[-1] += [_ms(row.estimate), _ms(row.reached.least if row.reached else None)]
        cells[-1] += _rates(row, limits)
    head = ["", "ms measured", "of step", "ms estimated", "ms at limits"]
    return command.table([*head, "GFLOP/s", "of peak", "GB/s", "of bandwidth"], cells)


def _rates(row: Row, limits: Limits) -> list[str]:
    cells = []
    if not (row.reached and row.measured):
        return ["", "", "", ""]
    for done, limit in ((row.reached.flops, limits.flops), (row.reached.bytes, limits.bandwidth)):
        rate = done / row.measured
        cells += [digits(rate / 1e9) if rate else "", _share(rate, limit)]
    return cells


def _summary(measured: Measured, limits: Limits) -> list[str]:
    """What limits the step, and how many operations ran side by side."""
    whole = sum(measured.side_by_side.values())
    products = [w for w in measured.work if w.instruction and w.instruction.flops]
    rest = [w for w in measured.work if w.instruction and not w.instruction.flops]
    flops = profile.reach(products, limits).flops
    moved = profile.reach(rest, limits).bytes
    none, one = (measured.side_by_side.get(n, 0.0) / whole for n in (0, 1))
    found = [
        f"products: {_part(products, whole, flops, limits.flops, 'peak')}; "
        f"the rest: {_part(rest, whole, moved, limits.bandwidth, 'bandwidth')}; "
        f"no operation: {none:.1%}",
        f"one operation at a time: {one:.1%} of the step; "
        f"several side by side: {max(0.0, 1 - none - one):.1%}",
    ]
    unknown = sum(w.seconds for w in measured.work if w.instruction is None)
    if unknown > _WORTH_SAYING * whole:
        found.append(f"{unknown / whole:.1%} of the step is not in {measured.program}")
    return found


def _part(work: list[Work], whole: float, done: float, limit: float | None, name: str) -> str:
    seconds = sum(w.seconds for w in work)
    at = f" at {done / seconds / limit:.0%} of the {name}" if seconds and limit else ""
    return f"{seconds / whole:.1%} of the step{at}"


def _deviations(rows: list[Row]) -> list[str]:
    off = [row for row in rows[1:] if row.ratio]
    if not off:
        return []
    ratio = off[0].ratio
    how = f"{digits(ratio)} x" if ratio >= 1 else f"1/{digits(1 / ratio)} of"
    return [f"off by most: {off[0].name}, {how} the estimate"]
