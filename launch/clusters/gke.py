"""TPU slices of a GKE cluster, through xpk (https://github.com/AI-Hypercomputer/xpk).

xpk builds a container image from a base image and the current folder, and starts it on every host.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from launch.clusters import project
from launch.clusters.programs import Programs


class Workload(NamedTuple):
    """A workload of a cluster.

    Attributes:
      name: of the workload.
      cluster: that exists.
      zone: of the cluster.
      project: "" is gcloud's own.
      kind: accelerator type in Google's spelling.
      slices: number of slices.
      spot: whether to ask for capacity that may be taken away.
      image: base image; it has Python 3.11 or later.
      restarts: how often a workload that was stopped is started again.
      arguments: of launch.train, without the work directory.
      workdir: gs:// folder.
      wandb: whether the run logs to Weights & Biases.
      env_file: local file of NAME=VALUE lines for the training; "" is none.
    """

    name: str
    cluster: str
    zone: str
    project: str
    kind: str
    slices: int
    spot: bool
    image: str
    restarts: int
    arguments: Sequence[str]
    workdir: str
    wandb: bool
    env_file: str


def run(programs: Programs, w: Workload) -> None:
    """Starts the workload; a preempted one is started again and goes on from its checkpoint."""
    install = f"pip install --quiet -e '{project.extras('tpu', w.wandb)}'"
    command = f"{install} && {project.train('python', w.arguments, w.workdir)}"
    options = [
        f"--tpu-type={w.kind}",
        f"--num-slices={w.slices}",
        *["--spot"] * w.spot,
        f"--base-docker-image={w.image}",
        f"--script-dir={os.path.relpath(project.ROOT)}",
        f"--max-restarts={w.restarts}",
        "--restart-on-user-code-failure",
        # From the notice to the end: long enough to save.
        "--termination-grace-period-seconds=180",
        *[f"--env-file={w.env_file}"] * bool(w.env_file),
        f"--command={command}",
    ]
    answer = programs.run([*_xpk(w, "create"), f"--workload={w.name}", *options])
    if answer:
        programs.show(answer)


def logs(programs: Programs, w: Workload) -> None:
    """Follows the log of the first host of the first slice."""
    labels = f"jobset.sigs.k8s.io/jobset-name={w.name},jobset.sigs.k8s.io/job-index=0"
    labels += ",batch.kubernetes.io/job-completion-index=0"
    programs.stream(["kubectl", "logs", "--follow", "--tail=-1", f"--selector={labels}"])


def status(programs: Programs, w: Workload) -> None:
    """Shows the workload's line in the list of the cluster."""
    if answer := programs.run([*_xpk(w, "list"), f"--filter-by-job={w.name}"]):
        programs.show(answer)


def delete(programs: Programs, w: Workload) -> None:
    """Deletes the workload; the cluster stays."""
    programs.run([*_xpk(w, "delete"), f"--workload={w.name}", "--force"])


def _xpk(w: Workload, verb: str) -> list[str]:
    where = [f"--cluster={w.cluster}", f"--zone={w.zone}"]
    if w.project:
        where.append(f"--project={w.project}")
    return ["xpk", "workload", verb, *where]
