"""Checkpoints: train state, data iterator and metadata as one unit; the only module with Orbax."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from lm.errors import InputError

_BEST = "validation_loss"


class Checkpoints:
    """Checkpoints of one run, in `directory/STEP/{state,data,metadata}`.

    Saving is asynchronous: the state is copied before `save` returns and written while training
    goes on; a checkpoint gets its final name when it is whole. The newest `keep` are kept and the
    `keep_best` with the lowest validation loss; those of the steps `keep_steps` are never removed.
    """

    def __init__(
        self,
        directory: epath.Path,
        say: Callable[[str], None],
        *,
        keep: int = 1,
        keep_best: int = 0,
        keep_steps: Sequence[int] = (),
        read_only: bool = False,
    ):
        if "://" not in str(directory):
            directory = epath.Path(os.path.abspath(directory))  # Orbax takes no relative path
        self._say = say
        self._directory = directory
        self._read_only = read_only
        for path in unfinished(directory):
            say(f"passed over {path}: its save was cut short")
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[_BEST],
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        kept = [policies.LatestN(keep)]
        kept += [best] * (keep_best > 0) + [policies.CustomSteps(keep_steps)] * bool(keep_steps)
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                async_options=ocp.AsyncOptions(timeout_secs=3600),
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        iterator: grain.DatasetIterator,
        metadata: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Saves `step`, unless it is there already. Errors of earlier saves are raised here."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(iterator),
                metadata=ocp.args.JsonSave(metadata),
            ),
            metrics=None if validation_loss is None else {_BEST: validation_loss},
            force=True,
        )

    def restore(
        self,
        abstract_state: Any,
        iterator: grain.DatasetIterator | None = None,
        step: int | None = None,
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that can be read (or that of `step`) as (state, metadata).

        None when there is none. The iterator, when given, is set to where it was. A checkpoint
        that cannot be read is named and passed over; a run that will save that step again moves
        it aside.

        Raises:
          InputError: there are checkpoints, and none can be read; or `step` is not among them.
        """
        steps = self.steps()
        if step is not None:
            if step not in steps:
                raise InputError(f"{self._directory} has no checkpoint {step}; it has {steps}")
            steps = [step]
        broken = []
        for candidate in reversed(steps):
            items = {
                "state": ocp.args.StandardRestore(abstract_state),
                "metadata": ocp.args.JsonRestore(),
            }
            try:
                restored = self._manager.restore(candidate, args=ocp.args.Composite(**items))
                if iterator is not None:
                    _restore_data(self._directory / str(candidate) / "data", iterator)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                reason = " ".join(str(error).split())[:200]
                self._say(f"passed over checkpoint {candidate}, which cannot be read: {reason}")
                broken.append(candidate)
                continue
            if broken and not self._read_only:
                if jax.process_index() == 0:
                    for bad in broken:
                        path = self._directory / str(bad)
                        path.rename(self._directory / f"unreadable_{bad}_{time.time_ns()}")
                if jax.process_count() > 1:
                    multihost_utils.sync_global_devices("unreadable checkpoints are aside")
                self._manager.reload()
            return restored["state"], restored["metadata"]
        if broken:
            raise InputError(f"{self._directory}: none of the checkpoints {broken} can be read")
        return None

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.close()


def _restore_data(folder: epath.Path, iterator: grain.DatasetIterator) -> None:
    """Sets the iterator to where it was, even if other processes had its streams.

    Grain writes one file a process; of streams, which have numbers in it, any process takes its
    own. Where there is one stream, all files say the same.
    """
    states = [json.loads(path.read_text()) for path in sorted(folder.glob("process_*.json"))]
    state = states[0]
    if "streams" in state:
        state = {"streams": {k: v for each in states for k, v in each["streams"].items()}}
    iterator.set_state(state)
    iterator.start_prefetch()


def saved_steps(directory: epath.Path) -> list[int]:
    """Steps of the whole checkpoints in a directory, oldest first, without opening any."""
    if not directory.exists():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """What saves that were cut short have left behind."""
    if not directory.exists():
        return []
    return sorted(p for p in directory.iterdir() if re.search(r"orbax-checkpoint-tmp", p.name))
