"""SLURM: a batch script written from the config, one process a GPU, on a shared file system.

SLURM counts one task a GPU because JAX gives a process that it finds under SLURM the one device of
its local rank. Options: https://slurm.schedmd.com/sbatch.html.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch.clusters import project
from launch.clusters.programs import Programs


class Job(NamedTuple):
    """A batch job.

    Attributes:
      name: of the job.
      nodes: machines.
      gpus_per_node: GPUs and processes of each.
      options: further options of sbatch, as --partition=gpu.
      arguments: of launch.train, without the work directory.
      workdir: on the shared file system, or gs://.
      env_file: file of NAME=VALUE lines for the training; "" is none.
      folder: where the script and the log are.
    """

    name: str
    nodes: int
    gpus_per_node: int
    options: Sequence[str]
    arguments: Sequence[str]
    workdir: str
    env_file: str
    folder: Path

    @property
    def log(self) -> Path:
        """What the job prints."""
        return self.folder / f"{self.name}.log"


def script(job: Job) -> str:
    """The batch script. After a preemption or at its time limit the job saves and queues again."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.gpus_per_node}",
        f"--gpus-per-node={job.gpus_per_node}",
        *job.options,
        f"--output={job.log.absolute()}",
        "--open-mode=append",
        "--requeue",
        # To the processes of srun, early enough for them to save; not to this script.
        "--signal=TERM@180",
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    lines.append(f"cd {shlex.quote(str(project.ROOT))}")
    if job.env_file:
        lines.append(f"set -a; . {shlex.quote(os.path.abspath(job.env_file))}; set +a")
    workdir = job.workdir if "://" in job.workdir else os.path.abspath(job.workdir)
    command = project.train(sys.executable, job.arguments, workdir)
    return "\n".join(
        [
            *lines,
            # The processes agree on when to stop: one that ends first must not end the others.
            f"srun --kill-on-bad-exit=0 {command}",
            "code=$?",
            f'if [ "$code" = {project.STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
            "",
        ]
    )


def run(programs: Programs, job: Job) -> None:
    """Writes the script and hands it in."""
    path = job.folder / f"{job.name}.sbatch"
    programs.note(f"{path}:")
    if programs.dry_run:
        programs.show(script(job).rstrip("\n"))
        programs.note("then:")
    else:
        job.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(script(job))
    if answer := programs.run(["sbatch", str(path)]):
        programs.show(answer)


def logs(programs: Programs, job: Job) -> None:
    """Shows the log, and follows it until interrupted."""
    programs.stream(["tail", "-n", "+1", "-F", str(job.log)])


def status(programs: Programs, job: Job) -> None:
    """Shows the job's line in the queue."""
    if answer := programs.run(["squeue", f"--name={job.name}", "--me"]):
        programs.show(answer)


def delete(programs: Programs, job: Job) -> None:
    """Takes the job out of the queue, and stops it."""
    programs.run(["scancel", f"--name={job.name}", "--me"])
