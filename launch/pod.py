"""Launches a training on Cloud TPU slices, a SLURM cluster or GKE; --dry_run shows every command.

python -m launch.pod run --name=demo --zone=us-west4-a --accelerator=v5e-256 --spot \
    --config=configs/quickstart.py --workdir=gs://BUCKET/demo
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from launch import command
from launch.clusters import cloud_tpu, gke, project, slurm
from launch.clusters.programs import Failed, Programs
from lm.errors import InputError

ACTIONS = ("create", "run", "logs", "status", "delete")
_PLATFORMS = ("tpu", "slurm", "gke")

_PLATFORM = flags.DEFINE_string("platform", "tpu", "tpu (Cloud TPU VMs), slurm, or gke (by xpk).")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print every command instead of running it.")
_ZONE = flags.DEFINE_string("zone", None, "tpu, gke: Google Cloud zone.")
_PROJECT = flags.DEFINE_string("project", "", "tpu, gke: Google Cloud project; gcloud's own.")
_ACCELERATOR = flags.DEFINE_string("accelerator", None, "tpu, gke: type of a slice, as v5e-256.")
_SPOT = flags.DEFINE_bool("spot", False, "tpu, gke: cheaper capacity that may be taken away.")
_RUNTIME = flags.DEFINE_string("runtime_version", "", "tpu: VM software; by generation.")
_CLUSTER = flags.DEFINE_string("cluster", None, "gke: name of the cluster.")
_IMAGE = flags.DEFINE_string("image", "python:3.12", "gke: base image, with Python 3.11 or later.")
_NODES = flags.DEFINE_integer("nodes", 1, "slurm: machines.")
_GPUS = flags.DEFINE_integer("gpus_per_node", 8, "slurm: GPUs of a machine.")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "slurm: further option, as --partition=gpu.")
_ENV_FILE = flags.DEFINE_string(
    "env_file", "", "File of NAME=VALUE lines for the training, as keys that no command may show."
)
_RESTARTS = flags.DEFINE_integer("restarts", 100, "tpu, gke: starts after interruptions.")
_POLL = flags.DEFINE_float("poll_seconds", 30.0, "tpu: between two questions for the state.")


def main(action: str) -> None:
    """Does one of ACTIONS."""
    if _PLATFORM.value not in _PLATFORMS:
        raise InputError(f"--platform={_PLATFORM.value} is not one of: {', '.join(_PLATFORMS)}")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", command.NAME.value):
        raise InputError(
            f"--name={command.NAME.value} must be lower-case letters, digits and hyphens, as "
            "--name=demo"
        )
    if action == "create" and _PLATFORM.value != "tpu":
        raise InputError(
            f"create is for --platform=tpu; {_PLATFORM.value} gives a run its machines itself"
        )
    programs = Programs(_DRY_RUN.value, print, command.say, first_pause=_POLL.value / 6)
    act = {"tpu": _tpu, "slurm": _slurm, "gke": _gke}[_PLATFORM.value](action, programs)
    try:
        act()
    except Failed as error:
        command.say(f"error: {error}")
        sys.exit(1)


def _tpu(action: str, programs: Programs) -> Callable[[], None]:
    _need("zone", _ZONE.value, "us-west4-a")
    asks = action in ("create", "run")
    kind = _kind() if asks else ""
    slices = cloud_tpu.Slices(
        command.NAME.value,
        _ZONE.value,
        _PROJECT.value,
        kind,
        command.SLICES.value,
        _SPOT.value,
        _RUNTIME.value,
    )
    tpu = cloud_tpu.CloudTpu(programs, slices, _POLL.value)
    if action == "run":
        _check_run(cloud_tpu.chips(kind) * command.SLICES.value)
        workdir, wandb = _bucket(), bool(command.CONFIG.value.train.wandb_project)
        arguments = command.config_arguments()
        training = cloud_tpu.Training(arguments, workdir, wandb, _ENV_FILE.value)
        return lambda: _run_tpu(tpu, training)
    if action == "status":
        return lambda: _show(tpu.state() or "there is no such request", programs)
    return getattr(tpu, action)


def _run_tpu(tpu: cloud_tpu.CloudTpu, training: cloud_tpu.Training) -> None:
    tpu.run(training, _RESTARTS.value)
    if _DRY_RUN.value:
        return
    command.say(
        f"finished: {training.workdir}; the slices cost money until launch.pod delete "
        f"--name={command.NAME.value} --zone={_ZONE.value}"
    )


def _slurm(action: str, programs: Programs) -> Callable[[], None]:
    workdir = command.WORKDIR.value or ""
    if action in ("run", "logs"):
        _need("workdir", workdir, "runs/demo")
    if action == "run":
        for name in ("nodes", "gpus_per_node"):
            if flags.FLAGS[name].value < 1:
                raise InputError(f"--{name}={flags.FLAGS[name].value} must be at least 1")
        for option in _SBATCH.value:
            if not re.fullmatch(r"-\S.*", option):
                raise InputError(f"--sbatch={option} is not an option, as --sbatch=--partition=gpu")
        _check_run(_NODES.value * _GPUS.value)
    job = slurm.Job(
        name=command.NAME.value,
        nodes=_NODES.value,
        gpus_per_node=_GPUS.value,
        options=_SBATCH.value,
        arguments=command.config_arguments(),
        workdir=workdir,
        env_file=_ENV_FILE.value,
        # Beside the run, where that is a folder; a batch system writes no log into a bucket.
        folder=Path("." if "://" in workdir else workdir),
    )
    return lambda: getattr(slurm, action)(programs, job)


def _gke(action: str, programs: Programs) -> Callable[[], None]:
    _need("zone", _ZONE.value, "us-west4-a")
    _need("cluster", _CLUSTER.value, "NAME")
    kind, workdir, wandb = "", "", False
    if action == "run":
        kind = _kind()
        _check_run(cloud_tpu.chips(kind) * command.SLICES.value)
        workdir, wandb = _bucket(), bool(command.CONFIG.value.train.wandb_project)
    workload = gke.Workload(
        name=command.NAME.value,
        cluster=_CLUSTER.value,
        zone=_ZONE.value,
        project=_PROJECT.value,
        kind=kind,
        slices=command.SLICES.value,
        spot=_SPOT.value,
        image=_IMAGE.value,
        restarts=_RESTARTS.value,
        arguments=command.config_arguments(),
        workdir=workdir,
        wandb=wandb,
        env_file=_ENV_FILE.value,
    )
    return lambda: getattr(gke, action)(programs, workload)


def _kind() -> str:
    """--accelerator in Google's spelling, with --slices checked."""
    _need("accelerator", _ACCELERATOR.value, "v5e-256")
    if command.SLICES.value < 1:
        raise InputError(f"--slices={command.SLICES.value} must be at least 1")
    return cloud_tpu.accelerator(_ACCELERATOR.value)


def _bucket() -> str:
    """--workdir, which has to outlive the workers."""
    _need("workdir", command.WORKDIR.value, "gs://BUCKET/demo")
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+/.+", command.WORKDIR.value):
        raise InputError(
            f"--workdir={command.WORKDIR.value} is not in a bucket; workers come and go, so give "
            "one, as gs://BUCKET/demo"
        )
    return command.WORKDIR.value


def _check_run(devices: int) -> None:
    """Refuses a run that would be refused on the workers: config, mesh, and what they lack."""
    config = command.CONFIG.value
    if config is None:
        raise InputError("--config=FILE.py is missing, for example --config=configs/quickstart.py")
    project.check_checkout()
    path = Path(command.config_file())
    if project.ROOT / "configs" not in path.absolute().parents:
        raise InputError(f"--config={path} is not in configs/, and only that is on the workers")
    here = config.data.corpus.split(",") if _PLATFORM.value != "slurm" else []
    for name in here:
        if Path(name.strip()).exists():
            raise InputError(
                f"data.corpus={name!r} is on this machine and not on the workers; valid: stdlib, "
                "tfds:NAME, or a folder or .jsonl file in a bucket, as gs://BUCKET/text.jsonl"
            )
    if _ENV_FILE.value and not Path(_ENV_FILE.value).is_file():
        raise InputError(f"--env_file={_ENV_FILE.value}: no such file")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # The accelerators at hand stay asleep.
    from lm.planning import plan
    from lm.training import experiment

    experiment.build(experiment.resolve(config), plan.vocabulary(config.data), devices)


def _need(name: str, value: str | None, example: str) -> None:
    if not value:
        raise InputError(f"--{name} is missing, for example --{name}={example}")


def _show(line: str, programs: Programs) -> None:
    if not programs.dry_run:
        print(line)


if __name__ == "__main__":
    command.run(main, ACTIONS)
