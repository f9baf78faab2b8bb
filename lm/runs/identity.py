"""The id of a run, by which a logger such as Weights & Biases recognises it."""

import secrets
from collections.abc import Mapping
from typing import Any

from lm.parallel.cross_process import first_message


def run_id(recorded: Mapping[str, Any]) -> str:
    """The id in the record of a run, or a new random one where the record has none.

    All processes call it, and all get the id of process 0.

    Args:
      recorded: content of the run's config.json; {} for a run that starts.
    """
    return first_message(recorded.get("run_id") or secrets.token_hex(8))
