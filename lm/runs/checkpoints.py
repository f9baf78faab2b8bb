"""Checkpoints: train state, data iterator and metadata as one unit; the only module with Orbax."""

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from lm import strict_json
from lm.errors import InputError, writing
from lm.parallel.cross_process import first_message
from lm.runs import integrity
from lm.runs.compatibility import STATE

_BEST = "validation_loss"

# Fields of the train state in a folder of their own beside `state`: two thirds of the bytes, of
# which a reader of the parameters alone needs none, not even to compare checksums.
_APART = ("optimizer",)


class Checkpoints:
    """Checkpoints of one run, in `directory/STEP/{state,optimizer,data,metadata}`.

    Saving is asynchronous: the state is copied before `save` returns and written while training
    goes on; a checkpoint gets its final name when it is whole and has a record of its files. The
    newest `keep` are kept and the `keep_best` with the lowest validation loss; those of the steps
    `keep_steps` are never removed.
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
        self._saving = None  # the step that is being written
        self._best = _Best(keep_best, {} if read_only else _validation_losses(directory))
        kept = [policies.LatestN(keep), self._best, policies.CustomSteps(keep_steps)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(
                timeout_secs=3600, post_finalization_callback=self._seal
            ),
        )
        with writing(directory):
            self._manager = ocp.CheckpointManager(directory, options=options)

    def _seal(self) -> None:
        """Records the files of the checkpoint that is about to get its final name.

        Orbax calls it on process 0, in the thread that saves, when all processes have written.
        """
        for folder in self._directory.iterdir():
            if re.fullmatch(rf"{self._saving}(\.orbax-checkpoint-tmp.*)?", folder.name):
                integrity.write_record(folder)

    def save(
        self,
        step: int,
        state: Any,
        source: Any,
        metadata: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Saves `step`, unless it is there already, when the save before it is complete.

        Raises:
          StorageError: that one, or this, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        self._saving = step
        if validation_loss is not None:
            if math.isfinite(validation_loss):
                metadata = {**metadata, _BEST: validation_loss}
            self._best.losses[step] = validation_loss
        with writing(self._directory / str(step)):
            parts = {k: ocp.args.StandardSave(_held_apart(v)) for k, v in _parts(state).items()}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **parts,
                    data=grain.checkpoint.CheckpointSave(_State(source)),
                    metadata=ocp.args.JsonSave(strict_json.encode(metadata)),
                ),
                force=True,
            )

    def check(self) -> None:
        """Raises StorageError when the last save has failed; does not wait for one under way."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for a save under way; raises StorageError when it fails."""
        with writing(self._directory / str(self._saving)):
            self._manager.wait_until_finished()
        self._saving = None

    def restore(
        self,
        abstract_state: Any,
        source: Any = None,
        step: int | None = None,
        *,
        fields: Sequence[str] | None = None,
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is intact (or that of `step`) as (state, metadata).

        None when there is none. The source of batches, when given, is set to where it was. With
        `fields` only those of the state are read, and the others are None. A damaged
        checkpoint is named and passed over; a run that will save that step again moves it aside.
        One without a record of its files is damaged when it cannot be read. All processes take the
        same one; each looks at its part of the files.

        Raises:
          InputError: there are checkpoints, and all are damaged; `step` is not among them; or one
            is intact, and cannot be restored here.
        """
        steps = saved_steps(self._directory)
        if step is not None:
            if step not in steps:
                raise InputError(f"{self._directory} has no checkpoint {step}; it has {steps}")
            steps = [step]
        unread = [name for name in _APART if fields is not None and name not in fields]
        damaged = []
        for candidate in reversed(steps):
            folder = self._directory / str(candidate)
            problem = integrity.damage(folder, jax.process_index(), jax.process_count(), unread)
            recorded = problem is not None
            problem = first_message(problem or "")
            if not problem:
                try:
                    restored = self._read(candidate, abstract_state, source, fields)
                except Exception as error:  # whatever a damaged file makes Orbax raise
                    problem = " ".join(str(error).split())[:200] or type(error).__name__
                    if recorded:
                        raise InputError(
                            f"{folder} is intact, and cannot be restored: {problem}"
                        ) from error
                problem = first_message(problem)
            if problem:
                self._say(f"passed over checkpoint {candidate}, which cannot be read: {problem}")
                damaged.append(candidate)
                continue
            if damaged and not self._read_only:
                self._move_aside(damaged)
            return restored
        if damaged:
            raise InputError(f"{self._directory}: none of the checkpoints {damaged} can be read")
        return None

    def _read(
        self, step: int, abstract_state: Any, source: Any, fields: Sequence[str] | None
    ) -> tuple[Any, dict[str, Any]]:
        folder = self._directory / str(step)
        state = _read_state(folder, abstract_state, fields)
        metadata = self._manager.restore(
            step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
        )["metadata"]
        if source is not None:
            _restore_data(folder / "data", source)
        return state, metadata

    def _move_aside(self, steps: Sequence[int]) -> None:
        if jax.process_index() == 0:
            with writing(self._directory):
                for step in steps:
                    path = self._directory / str(step)
                    path.rename(self._directory / f"unreadable_{step}_{time.time_ns()}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("unreadable checkpoints are aside")
        self._manager.reload()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits for a save under way; raises StorageError when it fails."""
        try:
            self.wait()
        finally:
            with writing(self._directory):
                self._manager.close()


class _Best:
    """Keeps the checkpoints of lowest validation loss.

    Orbax has the like, and forgets the losses when the process ends.
    """

    def __init__(self, count: int, losses: dict[int, float]):
        self.count, self.losses = count, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        known = [step for step in steps if math.isfinite(self.losses.get(step, math.inf))]
        best = sorted(known, key=self.losses.get)[: self.count]
        return [step in best for step in steps]


def _validation_losses(directory: epath.Path) -> dict[int, float]:
    losses = {}
    for step in saved_steps(directory):
        try:
            metadata = strict_json.loads(
                (directory / str(step) / "metadata" / "metadata").read_text()
            )
            losses[step] = float(metadata[_BEST])
        except (OSError, ValueError, TypeError, KeyError):  # none, or a damaged one
            continue
    return losses


def _fields(state: Any) -> dict[str, Any]:
    return state._asdict() if isinstance(state, tuple) else dict(state)


def _held_apart(part: Any) -> Any:
    """A copy of the arrays where the device is a CPU, else the arrays themselves.

    On CPU the writer reads the memory of an array itself. A step that is given the array to write
    in place would wait until all of it is on the disk.
    """
    return jax.tree.map(lambda x: x.copy() if _on_cpu(x) else x, part)


def _on_cpu(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return False
    return all(device.platform == "cpu" for device in x.sharding.device_set)


def _parts(state: Any) -> dict[str, dict[str, Any]]:
    """Folder of a checkpoint -> fields of the state in it; Orbax writes no folder of no array."""
    fields = _fields(state)
    apart = {k: {k: fields.pop(k)} for k in _APART if jax.tree.leaves(fields.get(k))}
    return {"state": fields, **apart}


def _read_state(folder: epath.Path, abstract_state: Any, fields: Sequence[str] | None) -> Any:
    """The fields of a train state, each array with its sharding; others stay on the disk."""
    abstract = _fields(abstract_state)
    wanted = {k: abstract[k] for k in (abstract if fields is None else fields)}
    found = dict.fromkeys(abstract)
    for name in _APART:  # older checkpoints have them in `state`
        if name in wanted and (folder / name).exists():
            found |= _read_fields(folder / name, {name: wanted.pop(name)})
    found |= _read_fields(folder / "state", wanted) if wanted else {}
    return type(abstract_state)(**found) if isinstance(abstract_state, tuple) else found


def _read_fields(folder: epath.Path, abstract: dict[str, Any]) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        names = {}
        for field in abstract:
            old = STATE.get(field, field)
            names[old if field not in stored and old in stored else field] = field
        item = {name: abstract[field] for name, field in names.items()}
        _check_shapes(item, stored)
        restored = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )
    return {field: restored[name] for name, field in names.items()}


def _check_shapes(item: Any, stored: Any) -> None:
    """Raises ValueError for a leaf that is not in the checkpoint, or there in another shape.

    Orbax would leave it out, or cut it to fit.
    """

    def shapes(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(np.shape(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    saved = shapes(stored)
    for name, shape in shapes(item).items():
        if saved.get(name) != shape:
            raise ValueError(f"{name} is saved as {saved.get(name)}, not {shape}")


class _State:
    """The state of a source of batches, in the form in which Grain's handler writes it."""

    def __init__(self, source: Any):
        self._source = source

    def get_state(self) -> bytes:
        return strict_json.dumps(self._source.get_state(), indent=4).encode()


def _restore_data(folder: epath.Path, source: Any) -> None:
    """Sets the source of batches to where it was, even if other processes had its streams.

    Grain writes one file a process; of streams, which have numbers in it, any process takes its
    own. Where there is one stream, all files say the same.
    """
    states = [strict_json.loads(path.read_text()) for path in sorted(folder.glob("process_*.json"))]
    state = states[0]
    if "streams" in state:
        state = {"streams": {k: v for each in states for k, v in each["streams"].items()}}
    source.set_state(state)


def saved_steps(directory: epath.Path) -> list[int]:
    """Steps of the whole checkpoints in a directory, oldest first, without opening any."""
    return sorted(int(path.name) for path in _entries(directory) if _is_whole(path))


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """What saves that were cut short have left behind."""
    return sorted(
        path
        for path in _entries(directory)
        if "orbax-checkpoint-tmp" in path.name or (path.name.isdigit() and not _is_whole(path))
    )


def _entries(directory: epath.Path) -> list[epath.Path]:
    return list(directory.iterdir()) if directory.exists() else []


def _is_whole(path: epath.Path) -> bool:
    """Whether it is a checkpoint that Orbax has completed.

    In a bucket, where nothing can be renamed, the last file says so, not the name.
    """
    if not path.name.isdigit():
        return False
    return "://" not in str(path) or (path / "commit_success.txt").exists()
