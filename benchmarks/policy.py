r"""Policy gradients on made sums: held-out problems that are solved, with intervals over seeds.

python benchmarks/policy.py --runs=runs/policy [--methods=grpo,dapo,gspo,ctpo,balanced] \
    [--seeds=0,1,2] [--config.KEY=VALUE ...]

A model is pretrained on sums for each seed with configs/sums.py, and every method
of configs/policy goes on from it: the same problems, samples and steps for all of them. Every run
is a command of launch.train with a folder of its own, and one that has ended is not run again.
Further arguments are those of launch.train, for the runs of the methods.

Prints a table: mean over the seeds and 95% interval (Student's t) of the share of held-out problems
that are solved greedily, at the end, and as differences to the pretrained model and to the first
method of the same seed; of the answers that were drawn in the last logged step; and of the
thousands of tokens that were drawn in all.
"""

import subprocess
import sys
from pathlib import Path

from absl import flags
from intervals import interval

from launch import command
from lm.training.logging import read_metrics

_RUNS = flags.DEFINE_string("runs", "runs/policy", "Folder of the work directories.")
_METHODS = flags.DEFINE_list(
    "methods",
    ["grpo", "dapo", "gspo", "ctpo", "balanced"],
    "Names of configs/policy, each perhaps with its argument, NAME:ARGUMENT.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of models, problems and samples.")

# What launch.train gets besides; the flags of this script are others.
FURTHER = [one for one in sys.argv[1:] if one.startswith("--config.")]
HEADER = ("method", "solved", "gained", "to the first", "solved, drawn", "drawn, thousands")


def main() -> None:
    """Trains what is missing, and prints the table."""
    before = {seed: solved(train("sums", seed)) for seed in _SEEDS.value}
    rows, first = [["pretrained", interval([*before.values()]), "", "", "", ""]], None
    for name in _METHODS.value:
        runs = {seed: train(f"policy/{name}", seed) for seed in _SEEDS.value}
        first = first or runs
        columns = (
            [solved(run) for run in runs.values()],
            [solved(run) - before[seed] for seed, run in runs.items()],
            [solved(run) - solved(first[seed]) for seed, run in runs.items()],
            [last(run, "train")["solved"] for run in runs.values()],
            [drawn(run) / 1000 for run in runs.values()],
        )
        rows.append([name, *map(interval, columns)])
        print("\n".join(command.table(HEADER, rows)), flush=True)


def train(name: str, seed: str) -> Path:
    """The work directory of a run that has ended; a method begins with the sums of this seed."""
    file, colon, argument = name.partition(":")
    folder = Path(_RUNS.value) / f"{Path(name).name.replace(':', '_')}_{seed}"
    if not (folder / "curves.png").exists():
        program = [
            sys.executable,
            "-m",
            "launch.train",
            f"--config=configs/{file}.py{colon}{argument}",
        ]
        arguments = [f"--config.train.seed={seed}", f"--workdir={folder}"]
        if name != "sums":
            begin = Path(_RUNS.value) / f"sums_{seed}"
            arguments += [f"--config.initialise.from={begin}", *FURTHER]
        subprocess.run([*program, *arguments], check=True)
    return folder


def drawn(folder: Path) -> float:
    """Tokens of all answers that were drawn for training, but for those drawn while compiling."""
    lines = [one for one in read_metrics(folder) if one["kind"] == "train"]
    rates = [(one["sampling_seconds"], one.get("sampled_tokens_per_second", 0.0)) for one in lines]
    return sum(seconds * rate for seconds, rate in rates)


def last(folder: Path, kind: str) -> dict[str, float]:
    """The last line of metrics of a kind."""
    return [one for one in read_metrics(folder) if one["kind"] == kind][-1]


def solved(folder: Path) -> float:
    """The share of held-out problems that the model solves at its end."""
    return last(folder, "validation")["solved"]


if __name__ == "__main__":
    sys.argv = [one for one in sys.argv if one not in FURTHER]
    command.run(main)
