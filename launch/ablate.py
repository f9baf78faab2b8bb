"""Runs every variant of an ablation with every seed, and reports what can be said of them.

python -m launch.ablate --config=configs/ablations/FILE.py --workdir=DIR [--processes=2] [--status]

The same command again goes on: it skips what is done, resumes what was cut, and tries again what
has failed. --jobs=slurm prints the runs that are left as jobs, instead of running them. --fit takes
results.csv files of ablations with runs of several sizes and lengths, and fits scaling laws.
--power says, before anything is trained, which differences the seeds of a study can resolve.
--stop_early looks at the comparisons after every seed, and ends those that are decided.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, processes
from lm.errors import InputError

_POWER = flags.DEFINE_bool(
    "power",
    False,
    "Say what the seeds can resolve, from --deviation or finished runs; run nothing.",
)
_DIFFERENCE = flags.DEFINE_float("difference", None, "Bits per byte that are to be resolved.")
_DEVIATION = flags.DEFINE_float(
    "deviation", None, "--power: standard deviation of paired differences, bits per byte."
)
_STOP_EARLY = flags.DEFINE_bool(
    "stop_early", False, "Look after every seed; train no further what is worse or out of reach."
)
_STATUS = flags.DEFINE_bool("status", False, "Show how far the runs are, and run nothing.")
_JOBS = flags.DEFINE_enum("jobs", None, ["slurm", "pod"], "Print the runs as jobs; run nothing.")
_FIT = flags.DEFINE_list("fit", [], "results.csv files to fit scaling laws to.")
_HELD_OUT = flags.DEFINE_list("held_out", [], "Variants that --fit predicts and is not fitted to.")


def main() -> None:
    """Checks, counts, runs and reports."""
    if _FIT.value:
        _fit()
        return
    if _POWER.value:
        _show_power()
        return
    folder, name = _check_flags()
    environment = dict(os.environ)
    devices = command.DEVICES.value
    if not _STATUS.value and devices is None:
        devices = _count_devices(environment)
    # The accelerators are for the runs; what is done here needs none.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from launch import early_stopping, records
    from lm.studies import ablation, ablation_runs

    asked = ablation.read(command.CONFIG.value)
    if _STATUS.value:
        _show_status(asked, folder)
        return
    early_stopping.check(asked, folder, _STOP_EARLY.value)
    command.say("checking every variant")
    planned = ablation.make_plan(asked, devices)
    rates = records.known_rates(planned, asked, folder)
    if asked.match == "time":
        rates = _measure(planned, folder, environment)
        planned = ablation.make_plan(asked, devices, rates)
    runs = ablation_runs.runs(planned, asked.seeds, folder)
    records.check(runs)
    print("\n".join(records.costs(planned, asked, rates)), flush=True)
    records.write(runs, name)
    early_stopping.write(asked, folder, _STOP_EARLY.value)
    left = [run for run in runs if not records.is_done(run)]
    if _JOBS.value and left:
        print("\n".join(_job_lines(left, _JOBS.value)))
        return
    count = command.PROCESSES.value or 1
    if _STOP_EARLY.value:
        failed = early_stopping.run(asked, runs, lambda some: _run(some, environment, count))
    else:
        failed = _run(runs, environment, count)
    if failed is None:
        command.say("stopped by a signal. The same command goes on from there.")
        return
    _report(asked, planned, runs, name, folder)
    if failed:
        command.say(f"failed: {', '.join(failed)}. The same command tries again.")
        sys.exit(1)


def _check_flags() -> tuple[Path, str]:
    """The work directory, and the config and the changes to it as the user has named them."""
    _check_config()
    for name, flag in (("difference", _DIFFERENCE), ("deviation", _DEVIATION)):
        if flag.value is not None:
            raise InputError(f"--{name}={flag.value} needs --power")
    if not command.WORKDIR.value:
        raise InputError("--workdir=FOLDER is missing, for example --workdir=runs/codes")
    if "://" in command.WORKDIR.value:
        raise InputError(f"--workdir={command.WORKDIR.value}: an ablation needs a local folder")
    folder = Path(command.WORKDIR.value)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--workdir={folder} is a file; give a folder")
    if _STOP_EARLY.value and _JOBS.value:
        raise InputError("--stop_early looks at the runs after every seed; --jobs prints all runs")
    if (count := command.PROCESSES.value) is not None and count < 1:
        raise InputError(f"--processes={count} must be at least 1")
    return folder, " ".join([_given("config"), *_changes()])


def _check_config() -> None:
    if command.CONFIG.value is None:
        raise InputError(
            "--config=FILE.py is missing, for example --config=configs/ablations/codes.py"
        )


def _given(flag: str) -> str:
    """A flag's value as text, which ml_collections does not keep."""
    for before, argument in zip(["", *sys.argv], sys.argv, strict=False):
        if argument.lstrip("-").startswith(f"{flag}="):
            return argument.partition("=")[2]
        if before.lstrip("-") == flag:
            return argument
    return ""


def _changes() -> list[str]:
    """The --config.KEY=VALUE of the command, but for the seeds, which every row of a table has."""
    given = [argument for argument in sys.argv if argument.startswith("--config.")]
    return [shlex.quote(one) for one in given if not one.startswith("--config.seeds=")]


def _count_devices(environment: dict[str, str]) -> int:
    """Devices that a run will see; asked of a process of its own, for this one takes none."""
    code = "import jax; print(jax.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"JAX finds no devices: {reason}")
    return int(done.stdout)


def _measure(planned: Any, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Tokens per second of every variant, from short runs one at a time."""
    from launch import records
    from lm.studies import ablation_runs

    runs = ablation_runs.measuring_runs(planned, folder)
    records.check(runs)
    records.write(runs, "the speed")
    if any(not records.is_done(run) for run in runs):
        command.say(f"measuring the speed of {len(runs)} variants, one at a time")
    failed = _run(runs, environment, 1)
    if failed is None:
        raise InputError("stopped by a signal before all variants were measured")
    if failed:
        raise InputError(f"match='time': {failed[0]} could not be measured, see its log")
    return {run.planned.variant.name: records.progress(run).tokens_per_second for run in runs}


def _run(runs: Any, environment: dict[str, str], count: int) -> list[str] | None:
    """Runs what is left; the names of what has failed, None after a signal."""
    from launch import records
    from lm.training.stopping import stop_signals

    jobs = [
        processes.Job(
            run.name,
            tuple(_command(run)),
            run.folder,
            run.needs,
            lambda run=run: records.is_done(run),
        )
        for run in runs
    ]
    with stop_signals() as stop:
        failed = processes.run_all(jobs, count, environment, command.say, lambda: bool(stop))
        return None if stop else failed


def _command(run: Any) -> list[str]:
    variant = run.planned.variant
    start = [sys.executable, "-m"]
    if not variant.quantizes:
        config = run.folder / "config.py"
        return [*start, "launch.train", f"--config={config}", f"--workdir={run.folder}"]
    options = [
        f"--{key.removeprefix('quantize.')}={value}"
        for key, value in variant.changes.items()
        if key != "quantize.run"
    ]
    output = f"--output={run.folder / 'packed.safetensors'}"
    source = f"--workdir={run.needs[0]}"
    return [*start, "launch.quantize", source, *options, output, f"--metrics={run.folder}"]


def _job_lines(runs: Any, kind: str) -> list[str]:
    """A shell script that submits every run, after those that it needs."""
    number = {run.folder: i for i, run in enumerate(runs)}
    lines = [
        "#!/bin/sh",
        "# Submits the runs that are left; launch.ablate reports when they ended.",
    ]
    if kind == "pod":
        return [*lines, *map(_pod_line, runs)]
    for i, run in enumerate(runs):
        _, *arguments = _command(run)
        words = shlex.join(["python", *arguments])
        after = [f"$job{number[need]}" for need in run.needs if need in number]
        depends = f" --dependency=afterok:{':'.join(after)}" if after else ""
        name = shlex.quote(f"--job-name={run.name}")
        wrap = shlex.quote(f"--wrap={words}")
        lines.append(f"job{i}=$(sbatch --parsable {name}{depends} {wrap})")
    return lines


def _pod_line(run: Any) -> str:
    """A command of launch.pod; $POD has its options for machines, $BUCKET is copied back after."""
    if run.needs:
        raise InputError(f"--jobs=pod: {run.name} needs {run.needs[0]}, which is not in the bucket")
    name = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")
    config, place = run.folder / "config.py", "/".join(run.folder.parts[-2:])
    options = shlex.join([f"--name={name}", f"--config={config}"])
    return f'python -m launch.pod run $POD {options} --workdir="$BUCKET"/{shlex.quote(place)}'


def _show_status(asked: Any, folder: Path) -> None:
    from launch import records

    print("\n".join(records.status(asked, folder)))


def _show_power() -> None:
    _check_config()
    from launch import study_power
    from lm.studies import ablation

    asked = ablation.read(command.CONFIG.value)
    folder = Path(command.WORKDIR.value) if command.WORKDIR.value else None
    print("\n".join(study_power.lines(asked, folder, _DIFFERENCE.value, _DEVIATION.value)))


def _report(asked: Any, planned: Any, runs: Any, name: str, folder: Path) -> None:
    from launch import early_stopping, records, report

    rows = records.rows(asked, runs, name)
    if _STOP_EARLY.value:
        rows = early_stopping.mark(asked, rows)
    if not rows:
        command.say("no run has ended: nothing to report")
        return
    records.write_csv(folder / "results.csv", rows)
    written = report.write(asked, planned, runs, rows, name, folder)
    print(written.summary)
    print(f"report: {written.page}")


def _fit() -> None:
    from launch import scaling_report
    from launch.records import read_csv

    output = Path(command.OUTPUT.value or "scaling.html")
    if not output.parent.is_dir() or output.is_dir():
        raise InputError(f"--output={output} is not a file in a folder that is there")
    rows = [row for path in _FIT.value for row in read_csv(Path(path))]
    print(scaling_report.write(rows, tuple(_HELD_OUT.value), output))


if __name__ == "__main__":
    command.run(main)
