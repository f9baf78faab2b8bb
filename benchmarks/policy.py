r"""Policy gradients on made sums: held-out problems that are solved, with intervals over seeds.

python benchmarks/policy.py --runs=runs/policy [--methods=grpo,dapo,gspo,ctpo,balanced] \
    [--seeds=0,1,2] [--table=policy_methods] [--collect=docs/results] [--config.KEY=VALUE ...]

A model is pretrained on sums for each seed with configs/sums.py, and every method
of configs/policy goes on from it: the same problems, samples and steps for all of them. Every run
is a command of launch.train with a folder of its own, and one that has ended is not run again.
Further arguments are those of launch.train, for the runs of the methods.

Prints a table of launch.benchmark_tables: policy_methods, or by another name policy_quantized,
compares the methods at the end, policy_grpo shows the way of the first one. --collect writes it to
a folder, with the metrics of all runs beside it, from which `python -m launch.results --trace`
makes it again.
"""

import subprocess
import sys
from pathlib import Path

from absl import flags

from launch import benchmark_tables, command
from lm.training.logging import read_metrics

_RUNS = flags.DEFINE_string("runs", "runs/policy", "Folder of the work directories.")
_METHODS = flags.DEFINE_list(
    "methods",
    ["grpo", "dapo", "gspo", "ctpo", "balanced"],
    "Names of configs/policy, each perhaps with its argument, NAME:ARGUMENT.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of models, problems and samples.")
_TABLE = flags.DEFINE_enum(
    "table",
    "policy_methods",
    [name for name in benchmark_tables.TABLES if name.startswith("policy")],
    "Which table is made.",
)
_COLLECT = flags.DEFINE_string("collect", None, "Folder to write the table and its runs to.")

# What launch.train gets besides; the flags of this script are others.
FURTHER = [one for one in sys.argv[1:] if one.startswith("--config.")]


def main() -> None:
    """Trains what is missing, and prints the table."""
    runs = {}
    for name in ("sums", *(f"policy/{method}" for method in _METHODS.value)):
        for seed in _SEEDS.value:
            runs[Path(name).name, int(seed)] = read_metrics(train(name, seed))
    head, *rows = benchmark_tables.TABLES[_TABLE.value](runs)
    print("\n".join(command.table(head, rows)))
    if _COLLECT.value:
        written = benchmark_tables.collect(_TABLE.value, runs, Path(_COLLECT.value))
        print(f"written: {written}")


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


if __name__ == "__main__":
    sys.argv = [one for one in sys.argv if one not in FURTHER]
    command.run(main)
