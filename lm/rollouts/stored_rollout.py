"""The batch of a rollout as JSON, for a run that is killed between two steps on it.

B rows, T tokens of a row.
"""

import base64
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lm.data.layout import BATCH, POLICY
from lm.errors import InputError

_OTHER = (
    "the newest checkpoint holds the position of another source of batches: with the same "
    "objective, train.batch_size and data.sequence_length the run goes on"
)


def encode(
    rows: Mapping[str, np.ndarray], left: int, metrics: Mapping[str, np.floating]
) -> dict[str, Any]:
    """The rows of one process, how many steps are left on them, and what is said of them."""
    return {
        "left": left,
        "metrics": {name: float(value) for name, value in metrics.items()},
        "rows": {name: base64.b64encode(x.tobytes()).decode() for name, x in rows.items()},
    }


def decode(
    state: Mapping[str, Any], shape: tuple[int, int], names: Collection[str]
) -> tuple[dict[str, np.ndarray], int, dict[str, np.float32]]:
    """The rows of all processes, how many steps are left on them, and what was said of them.

    Args:
      state: {"streams": {share of the rows: what `encode` gave}}; no stream between two rollouts.
      shape: (B, T), of all processes.
      names: of the arrays.

    Raises:
      InputError: the state is that of another source, or of other shapes.
    """
    try:
        streams = [stream for _, stream in sorted(state["streams"].items(), key=_number)]
        if not streams:
            return {}, 0, {}
        left = int(streams[0]["left"])
        metrics = {name: np.float32(x) for name, x in streams[0]["metrics"].items()}
        rows = {}
        for name in names:
            content = b"".join(base64.b64decode(stream["rows"][name]) for stream in streams)
            rows[name] = np.frombuffer(content, (BATCH | POLICY)[name]).reshape(shape)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(_OTHER) from error
    return rows, left, metrics


def _number(stream: tuple[str, Any]) -> int:
    return int(stream[0])
