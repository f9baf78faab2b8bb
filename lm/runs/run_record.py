"""A run, from the folder that it left: its config, its model, and what was trained."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from lm import strict_json
from lm.errors import InputError
from lm.runs import compatibility
from lm.runs.checkpoints import Checkpoints


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
    """What config.json in a work directory holds, of any format; {} where there is none.

    Raises:
      InputError: it is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        content = strict_json.loads(path.read_text())
        known = "data" in content["config"]
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise InputError(f"{path} is damaged; if you have no copy, give another work directory")
    try:
        return compatibility.upgrade(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


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


def parameters(config: ConfigDict) -> tuple[str, ...]:
    """The fields of the train state that a model is read from: its average where there is one."""
    return ("step", "ema" if config.train.ema_decay else "trained")


def restore(
    record: Record,
    abstract_state: Any,
    key: str,
    say: Callable[[str], None],
    step: int | None = None,
    *,
    fields: Sequence[str] | None = None,
    source: Any = None,
) -> Any:
    """The state of the newest checkpoint, or of that of `step`.

    Args:
      record: of the run.
      abstract_state: shapes, dtypes and shardings of its train state; arrays are read shard by
        shard.
      key: how the user has named the run, for messages.
      say: shows one line.
      step: of the checkpoint.
      fields: of the state that are read; the others are None. None reads all.
      source: of batches, set to where it was.

    Raises:
      InputError: no such checkpoint.
    """
    checkpoints = Checkpoints(record.folder / "checkpoints", say, read_only=True)
    try:
        restored = checkpoints.restore(abstract_state, source, step, fields=fields)
    finally:
        checkpoints.close()
    if restored is None:
        raise InputError(f"{key}={record.folder} holds no checkpoint yet")
    state, _ = restored
    return state
