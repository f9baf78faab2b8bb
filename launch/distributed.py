"""Several processes that train together: how this one finds the others, and what ends it."""

import os
import sys
import threading
import warnings
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict

from launch import command
from lm.errors import InputError, StorageError

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT where process 0 listens; a cluster that JAX knows needs none."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which one, from 0.")

LOST = 1  # exit code of a process that has lost the others, or never found them
UNWRITTEN = 74  # and of one that cannot write its files (EX_IOERR of sysexits.h)


def join(c: ConfigDict) -> None:
    """Joins the processes of this run, before JAX computes anything.

    Without flags, JAX looks for a cluster: TPU pod slices, GKE, SLURM (under srun), Open MPI, or
    JAX_COORDINATOR_ADDRESS; where there is none, this process trains alone.

    Args:
      c: the `distributed` section.

    Raises:
      InputError: the flags do not go together, or there are other than `c.processes` processes.
    """
    import jax

    _check(c)
    if _COORDINATOR.value:
        _connect(
            c,
            coordinator_address=_COORDINATOR.value,
            num_processes=command.PROCESSES.value,
            process_id=_PROCESS_ID.value,
            cluster_detection_method="deactivate",
        )
    elif command.PROCESSES.value != 1:
        _connect(c)
    if c.processes and jax.process_count() != c.processes:
        raise InputError(
            f"distributed.processes={c.processes}, and there are {jax.process_count()}; valid: as "
            "many as are started, or 0 for any number"
        )


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a process that loses another one ends with a line and the code LOST.

    One that cannot write ends with a line and the code UNWRITTEN, and so the others lose it.

    A collective that fails says so in Python. One that hangs is ended by the heartbeats, by JAX
    itself, after `distributed.heartbeat_seconds`.
    """
    import jax

    try:
        main()
    except StorageError as error:
        _give_up(str(error), UNWRITTEN)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _give_up(
            f"process {jax.process_index()} of {jax.process_count()} lost the others "
            f"({_short(error)}). Start all of them again, and the run goes on from its checkpoint"
        )


def _connect(c: ConfigDict, **options) -> None:
    """jax.distributed.initialize, with one line where JAX would abort with a stack trace."""
    import jax

    late = (
        f"not all processes came within distributed.join_seconds={c.join_seconds}. Are all of "
        "them started, with the same coordinator, and can they reach it?"
    )
    watch = threading.Timer(c.join_seconds, _give_up, [late])
    watch.daemon = True
    watch.start()
    try:
        with warnings.catch_warnings():
            # In a Kubernetes pod JAX asks for a package that only a cluster of GPUs needs.
            warnings.simplefilter("ignore")
            jax.distributed.initialize(
                # JAX's own time is never up first.
                initialization_timeout=c.join_seconds + 60,
                heartbeat_timeout_seconds=c.heartbeat_seconds,
                shutdown_timeout_seconds=c.heartbeat_seconds,
                **options,
            )
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise InputError(f"--coordinator: {_short(error)}") from None
    except RuntimeError as error:
        _give_up(f"this process cannot join the others: {_short(error)}")
    finally:
        watch.cancel()


def _give_up(message: str, code: int = LOST) -> None:
    """Ends this process now: an orderly end would wait for the others, or for a broken save."""
    command.say(f"error: {message}")
    sys.stdout.flush()
    os._exit(code)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check(c: ConfigDict) -> None:
    for key, least in (("processes", 0), ("join_seconds", 1), ("heartbeat_seconds", 1)):
        if c[key] < least:
            raise InputError(f"distributed.{key}={c[key]} must be at least {least}")
    if not _COORDINATOR.value:
        if _PROCESS_ID.value is not None or command.PROCESSES.value not in (None, 1):
            raise InputError("--processes and --process_id need --coordinator=HOST:PORT")
        return
    host, _, port = _COORDINATOR.value.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--coordinator={_COORDINATOR.value} is not HOST:PORT")
    if command.PROCESSES.value is None or _PROCESS_ID.value is None:
        raise InputError("--coordinator needs --processes=N and --process_id=I")
    if not 0 <= _PROCESS_ID.value < (count := command.PROCESSES.value):
        raise InputError(
            f"--process_id={_PROCESS_ID.value} must be from 0 to {count - 1} with "
            f"--processes={count}"
        )
