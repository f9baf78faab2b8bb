"""Cloud TPU VMs as queued resources: one request for one or several slices.

Syntax: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources. On every worker
the project is in the folder `nibble` of the home directory, with a virtual environment of its own
(the image's Python may be older than what the project needs; uv brings one). There, a training
leaves train.log, train.pid and, at its end, train.exit.
"""

import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch.clusters import project
from launch.clusters.programs import Failed, Programs
from lm.errors import InputError

# Generation -> software of a TPU VM, from https://cloud.google.com/tpu/docs/runtimes.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

# Generations whose accelerator types count TensorCores, two a chip.
_COUNTED_IN_CORES = ("v4", "v5p")

_LEAVING = ("SUSPENDING", "DELETING")
_GONE = ("SUSPENDED", "FAILED")

_RUNNING = "running"  # what a worker says of a training that has not ended


def accelerator(name: str) -> str:
    """The accelerator type in Google's spelling: v5e-256 is v5litepod-256.

    Raises:
      InputError: it is none.
    """
    spelled = re.sub(r"^v5e-", "v5litepod-", name)
    if not re.fullmatch(rf"({'|'.join(RUNTIMES)})-[1-9]\d*", spelled):
        raise InputError(
            f"--accelerator={name} is not a TPU type; valid: v5e-N, v6e-N (N chips), v4-N, v5p-N "
            "(N / 2 chips), as v5e-256"
        )
    return spelled


def chips(kind: str) -> int:
    """Chips of one slice of an accelerator type in Google's spelling."""
    generation, count = kind.split("-")
    return int(count) // (2 if generation in _COUNTED_IN_CORES else 1)


class Slices(NamedTuple):
    """A request for TPU slices.

    Attributes:
      name: of the queued resource.
      zone: its zone.
      project: "" is gcloud's own.
      kind: accelerator type in Google's spelling.
      count: slices.
      spot: cheaper, and may be taken away.
      runtime: software of the VMs; "" is that of the generation.
    """

    name: str
    zone: str
    project: str
    kind: str
    count: int
    spot: bool
    runtime: str


class Training(NamedTuple):
    """What to run on all workers.

    Attributes:
      arguments: of launch.train, without the work directory.
      workdir: gs:// folder.
      wandb: whether the run logs to Weights & Biases.
      env_file: local file of NAME=VALUE lines for the training; "" is none.
    """

    arguments: Sequence[str]
    workdir: str
    wandb: bool
    env_file: str


class CloudTpu:
    """What can be done with a request and its VMs."""

    def __init__(self, programs: Programs, slices: Slices, poll_seconds: float):
        self._programs = programs
        self._slices = slices
        self._poll = poll_seconds

    def create(self) -> None:
        """Puts the request into Google's queue."""
        s = self._slices
        nodes = [f"--node-id={s.name}"]
        if s.count > 1:
            nodes = [f"--node-count={s.count}", f"--node-prefix={s.name}"]
        runtime = s.runtime or RUNTIMES[s.kind.split("-")[0]]
        options = [*nodes, f"--accelerator-type={s.kind}", f"--runtime-version={runtime}"]
        self._gcloud("create", s.name, *options, *["--spot"] * s.spot)

    def state(self) -> str:
        """The state of the request, "" when there is none."""
        return self._programs.run(
            self._words("describe", self._slices.name, "--format=value(state.state)"),
            accept="NOT_FOUND",
        )

    def delete(self) -> None:
        """Deletes the request and its VMs."""
        self._gcloud("delete", self._slices.name, "--force", "--quiet")

    def logs(self, first_line: int = 1) -> int:
        """Shows the log of worker 0 until its training ends; returns the number of lines."""
        follow = f"tail -n +{first_line} --pid=$(cat train.pid) -F train.log"
        # A connection to a worker that is no more ends after three unanswered questions.
        alive = "--ssh-flag=-oServerAliveInterval=30"
        words = self._ssh(f"cd nibble && {follow}", everywhere=False)
        return self._programs.stream([*words, alive])

    def run(self, training: Training, restarts: int) -> None:
        """Trains to the end, through preemptions.

        Slices that are missing or were taken away are requested (again); training goes on from the
        work directory. A training that is already running is followed.

        Raises:
          Failed: gcloud's message, or that of a training that failed by itself.
        """
        for _ in range(restarts + 1):
            self._await_active()
            try:
                ended = self._train(training)
            except Failed:
                if self._settled() == "ACTIVE":
                    raise
                ended = ""  # The workers were taken away in the middle of a command.
            if self._programs.dry_run:
                self._programs.note("after a preemption, before all of the above once more:")
                self.delete()
                return
            if ended == "0":
                return
            if ended not in (str(project.STOPPED), "") and self._settled() == "ACTIVE":
                raise Failed(f"the training ended with exit code {ended}: see the lines above")
            self._programs.note("the training was interrupted and goes on from its checkpoint")
            self._programs.pause(self._poll)
        raise Failed(f"gave up after {restarts} restarts (--restarts)")

    def _await_active(self) -> None:
        """Returns when the slices are there; requests them where they are not on their way."""
        requested, shown = False, None
        while (state := self.state()) != "ACTIVE":
            if state != shown and not self._programs.dry_run:
                self._programs.note(f"{self._slices.name}: {state or 'not requested yet'}")
            shown = state
            if state == "FAILED" and requested:
                raise Failed(f"the request {self._slices.name} has FAILED: launch.pod status")
            if state in _GONE:
                self.delete()
            if state in ("", *_GONE):
                self.create()
                requested = True
                if self._programs.dry_run:
                    self._programs.note(f"asking for its state every {self._poll:g} s, then:")
                    return
            else:
                self._programs.pause(self._poll)

    def _train(self, training: Training) -> str:
        """Trains until the end or an interruption; the exit code, "" when it is not known."""
        if self._training() != _RUNNING:
            self._install(training)
            self._start(training)
        lines = 0
        while True:
            lines += self.logs(first_line=lines + 1)
            found = self._training()
            if found != _RUNNING:
                return found
            self._programs.pause(self._poll)  # Only the connection was lost.

    def _install(self, training: Training) -> None:
        """Puts the project on all workers, in place of what was there."""
        archive = Path(tempfile.gettempdir()) / f"nibble-{self._slices.name}.tar.gz"
        self._programs.run(project.pack(archive))
        self._copy(str(archive), "nibble.tar.gz")
        if training.env_file:
            self._copy(training.env_file, "nibble.env")
        what = shlex.quote(project.extras("tpu", training.wandb))
        steps = [
            # What is left of a training whose other workers have died.
            'if [ -f nibble/train.pid ]; then kill -9 -- -"$(cat nibble/train.pid)"; fi',
            "rm -rf nibble",
            "mkdir nibble",
            "tar -xzf nibble.tar.gz -C nibble",
            "cd nibble",
            "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv",
            "python3 -m uv venv --quiet --python=3.11 .venv",
            f"python3 -m uv pip install --quiet --python=.venv/bin/python -e {what}",
        ]
        # The first may fail: there may be nothing left.
        self._programs.run(self._ssh(f"{steps[0]}; " + " && ".join(steps[1:])))

    def _start(self, training: Training) -> None:
        """Starts the same command on all workers, which goes on when the connection ends."""
        command = project.train(".venv/bin/python", training.arguments, training.workdir)
        if training.env_file:
            command = f"set -a; . ../nibble.env; set +a; {command}"
        script = shlex.quote(f"{{ {command}; }} > train.log 2>&1; echo $? > train.exit")
        detached = f"nohup setsid sh -c {script} > /dev/null 2>&1 < /dev/null & echo $! > train.pid"
        secret = "chmod 600 nibble.env && " if training.env_file else ""
        self._programs.run(self._ssh(f"{secret}cd nibble && {{ {detached}; }}"))

    def _training(self) -> str:
        """The exit code of worker 0's training; _RUNNING, or "" when there is none."""
        query = (
            "cd nibble 2> /dev/null && if [ -f train.exit ]; then cat train.exit; "
            f'elif kill -0 "$(cat train.pid)" 2> /dev/null; then echo {_RUNNING}; fi || true'
        )
        return self._programs.run(self._ssh(query, everywhere=False))

    def _settled(self) -> str:
        """The state of the request once Google has noticed what happened to its VMs."""
        self._programs.pause(self._poll)
        state = self.state()
        while state in _LEAVING:
            self._programs.pause(self._poll)
            state = self.state()
        return state

    def _copy(self, source: str, target: str) -> None:
        everywhere = ["--node=all", "--worker=all"]
        self._gcloud("scp", source, f"{self._slices.name}:{target}", *everywhere)

    def _ssh(self, command: str, everywhere: bool = True) -> list[str]:
        which = "all" if everywhere else "0"
        options = [f"--node={which}", f"--worker={which}", f"--command={command}"]
        return self._words("ssh", self._slices.name, *options)

    def _gcloud(self, verb: str, *words: str) -> str:
        return self._programs.run(self._words(verb, *words))

    def _words(self, verb: str, *words: str) -> list[str]:
        where = [f"--zone={self._slices.zone}"]
        if self._slices.project:
            where.append(f"--project={self._slices.project}")
        return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *where]
