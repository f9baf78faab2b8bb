"""Runs as processes of their own, several at a time, each in a work directory that it locks."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_POLL = 0.2  # seconds

# What is left in a work directory besides the run's own files.
LOG = "log.txt"
_LOCK = "lock"
_FAILED = "failed"


class Job(NamedTuple):
    """A process to run.

    Attributes:
      name: as it is shown.
      command: the program and its arguments.
      folder: its work directory, which is there; standard output and error go to `log.txt` in it.
      needs: folders of the jobs that must have ended well before.
      done: whether it has, from its files.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    needs: tuple[Path, ...]
    done: Callable[[], bool]


def run_all(
    jobs: Sequence[Job],
    processes: int,
    environment: Mapping[str, str],
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> list[str]:
    """Runs what is not done, in the order given, at most `processes` at a time.

    A job that fails is named, and so are those that need it; the others go on. When `stopped` says
    so, every process gets one SIGTERM, on which launch.train saves and ends.

    Returns:
      The names of the jobs that have failed or could not start.
    """
    waiting = [job for job in jobs if not job.done()]
    active: dict[Job, subprocess.Popen] = {}
    failed: dict[Path, str] = {}
    total, since, told = len(waiting), {}, False
    while waiting or active:
        for job in list(waiting):
            if lost := [need for need in job.needs if need in failed]:
                failed[job.folder] = job.name
                waiting.remove(job)
                say(f"{job.name}: not started, {failed[lost[0]]} has failed")
            elif len(active) < processes and not stopped() and _ready(job, waiting, active):
                waiting.remove(job)
                active[job], since[job] = _start(job, environment), time.monotonic()
                say(f"{job.name}: started, log in {job.folder / LOG}")
        for job, process in list(active.items()):
            if process.poll() is None:
                continue
            del active[job]
            taken = f"{time.monotonic() - since[job]:.0f} s"
            if process.returncode == 0 and job.done():
                ended = total - len(waiting) - len(active)
                say(f"{job.name}: done in {taken}; {ended} of {total}")
            elif not told:
                reason = last_line(job.folder)
                (job.folder / _FAILED).write_text(f"{reason}\n")
                failed[job.folder] = job.name
                say(f"{job.name}: failed with exit code {process.returncode}: {reason}")
        if stopped() and not told:
            told = True
            for process in active.values():
                process.send_signal(signal.SIGTERM)
        if told:
            waiting = []
        if active:
            time.sleep(_POLL)
    return list(failed.values())


def state(folder: Path, done: bool) -> str:
    """In a word what a run is doing: done, running, failed, cut or waiting."""
    if done:
        return "done"
    if is_locked(folder):
        return "running"
    if (folder / _FAILED).exists():
        return "failed"
    return "cut" if (folder / LOG).exists() else "waiting"


def last_line(folder: Path) -> str:
    """The last line of a job's log, "" where there is none."""
    path = folder / LOG
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def is_locked(folder: Path) -> bool:
    """Whether a process runs in the folder, on this machine."""
    if not (folder / _LOCK).exists():
        return False
    with (folder / _LOCK).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _ready(job: Job, waiting, active) -> bool:
    unfinished = {other.folder for other in (*waiting, *active)}
    return not unfinished & set(job.needs)


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
    (job.folder / _FAILED).unlink(missing_ok=True)
    with _locked(job.folder) as lock, (job.folder / LOG).open("a") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=[lock],  # the process holds the lock, even when this one is killed
            start_new_session=True,  # Ctrl-C is for this process, which passes on one signal
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)
