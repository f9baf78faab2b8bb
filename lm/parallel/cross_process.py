"""What all processes of a run do at the same step, because one of them wants it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.parallel.mesh import first_processes

_LONGEST = 400  # bytes


class CrossProcessAny:
    """Wishes such as to stop or to save, which come to one process and must be followed by all.

    With one process a wish is a decision. With several, every process hands in its wishes before
    each step and gets what any of them wished before the step before: the maximum over processes
    is one collective of a few bytes, started without waiting and read when the next one is, so that
    no step waits for it. All processes get the same answer at the same step.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._pending = None
        if self._alone:
            return
        flat = Mesh(mesh.devices.ravel(), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
        self._sharding = NamedSharding(flat, PartitionSpec("device"))
        whole = NamedSharding(flat, PartitionSpec())
        self._any = jax.jit(lambda wishes: jnp.max(wishes, axis=0), out_shardings=whole)

    def __call__(self, *wishes: bool) -> tuple[bool, ...]:
        """What to do now. All processes call it, with the same number of wishes."""
        if self._alone:
            return wishes
        local = np.array([wishes], np.int32)
        shape = (len(self._sharding.device_set), len(wishes))
        handed_in = jax.make_array_from_callback(shape, self._sharding, lambda where: local)
        before, self._pending = self._pending, self._any(handed_in)
        return (False,) * len(wishes) if before is None else tuple(np.asarray(before) > 0)

    def forget(self) -> None:
        """Drops the wishes on their way: they have been followed."""
        self._pending = None


def first_message(text: str) -> str:
    """The text of the first process that has one, "" where none has; all of them have to ask."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(encoded))
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in gathered]
    return next(filter(None, texts), "")


def from_first_process(value: bool) -> bool:
    """What process 0 says; all of them have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def of_all_shares(mesh: Mesh, values: np.ndarray) -> np.ndarray:
    """The float64 values of every share of the rows of a batch, [shares, ...]; all have to ask.

    Processes with the same share should have the same values, and where a clock has decided, they
    may not: the first of them is believed.

    Args:
      mesh: the mesh.
      values: of this process's share (`lm.parallel.mesh.share`), float64, of one shape everywhere.
    """
    if jax.process_count() == 1:
        return values[None]
    # As integers, because JAX would make float32 of them.
    words = np.ascontiguousarray(values, np.float64).view(np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(words))
    return np.ascontiguousarray(gathered[first_processes(mesh)]).view(np.float64)
