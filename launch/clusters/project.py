"""The project as it lies on this machine, and the command that trains it elsewhere."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lm.errors import InputError

ROOT = Path(__file__).parent.parent.parent

# What an installation needs. The working tree and not a commit: what is being tried out is
# what runs, workers need neither git nor credentials, and nothing else of the folder travels.
PARTS = ("configs", "launch", "lm", "objectives", "pyproject.toml", "README.md", "LICENSE")

# Exit code of a training that a signal has stopped: it has saved, and is to be started again.
STOPPED = 75


def check_checkout() -> None:
    """Raises InputError where the project is not one that can be copied and installed."""
    missing = [part for part in PARTS if not (ROOT / part).exists()]
    if missing:
        raise InputError(
            f"{ROOT} is not a checkout of this project (it has no {missing[0]}), so there is "
            "nothing to install on the workers"
        )


def pack(archive: Path) -> list[str]:
    """The command that writes the project into one file."""
    root = os.path.relpath(ROOT)
    return ["tar", "-czf", str(archive), "--exclude=__pycache__", "-C", root, *PARTS]


def extras(accelerator: str, wandb: bool) -> str:
    """What to install: the project in the current folder, with its extras."""
    return f".[{accelerator},wandb]" if wandb else f".[{accelerator}]"


def train(python: str, arguments: Sequence[str], workdir: str) -> str:
    """The shell command that trains, and ends with STOPPED when a signal stops it."""
    own = [f"--workdir={workdir}", f"--stopped_code={STOPPED}"]
    return shlex.join([python, "-m", "launch.train", *arguments, *own])
