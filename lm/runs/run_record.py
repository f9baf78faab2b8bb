"""A run, from the folder that it left: its config, its model, and what was trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import grain
from etils import epath
from ml_collections import ConfigDict

from lm import strict_json
from lm.errors import InputError
from lm.runs.checkpoints import Checkpoints
from lm.training.experiment import Experiment
from lm.training.state import TrainState


class Record(NamedTuple):
    """What config.json says of a run; `tokenizer` is a fingerprint."""

    folder: epath.Path
    config: ConfigDict
    vocab_size: int
    tokenizer: str


def is_run(folder: str) -> bool:
    """Whether a folder is the work directory of a run."""
    return (epath.Path(folder) / "config.json").exists()


def read_record(folder: epath.Path) -> dict[str, Any]:
    """What config.json in a work directory holds, {} where there is none.

    Raises:
      InputError: it is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        content = strict_json.loads(path.read_text())
        if "data" in content["config"]:
            return content
    except (ValueError, TypeError, KeyError):
        pass
    raise InputError(f"{path} is damaged; if you have no copy, give another work directory")


def read(folder: str, key: str) -> Record:
    """The record of a work directory; `key` is how the user has named it, for the message.

    Raises:
      InputError: there is no run in it.
    """
    path = epath.Path(folder)
    if not is_run(folder):
        raise InputError(f"{key}={folder} holds no run: there is no config.json in it")
    content = read_record(path)
    config = ConfigDict(content["config"])
    return Record(path, config, content["vocab_size"], content["tokenizer"])


def restore(
    record: Record,
    run: Experiment,
    key: str,
    say: Callable[[str], None],
    step: int | None = None,
    iterator: grain.DatasetIterator | None = None,
) -> TrainState:
    """The state of the newest checkpoint, or of that of `step`; an iterator is set to where it was.

    Arrays get the shardings of `run`, which is the run's own experiment on the devices at hand.

    Raises:
      InputError: no such checkpoint.
    """
    checkpoints = Checkpoints(record.folder / "checkpoints", say, read_only=True)
    try:
        restored = checkpoints.restore(run.abstract_state(), iterator, step)
    finally:
        checkpoints.close()
    if restored is None:
        raise InputError(f"{key}={record.folder} holds no checkpoint yet")
    state, _ = restored
    return state
