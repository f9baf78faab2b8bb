"""The record of a run, and what must be as it was for the run to go on."""

import contextlib
import importlib.metadata
import re
import sys
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm import strict_json
from lm.data.chats import CHATML
from lm.data.declared import GUESSED
from lm.data.hashing import fingerprint
from lm.data.tokenizers import Subwords, Tokenizer
from lm.errors import InputError, StorageError, writing
from lm.flat import leaves
from lm.parallel.cross_process import first_message
from lm.parallel.mesh import share
from lm.runs import compatibility, run_record
from lm.training import experiment

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# A work directory keeps what decides its parameters and the order of its data; of these sections
# and keys, only the exceptions may differ at a later start.
_FIXED = (
    "model",
    "data",
    "train.batch_size",
    "train.seed",
    "train.ema_decay",
    "train.trainable",
    "train.frozen",
    "optimizer.name",
    "quantization",
    "rollouts",
)
_FREE = (
    "model.attention",
    "model.remat",
    "model.unroll",
    "model.dtype",
    "model.plain_autodiff",
    "model.accept_aliasing",
    "quantization.gptq_batches",
    "data.directory",
)


def settle_streams(config: ConfigDict, workdir: epath.Path, mesh: Mesh) -> ConfigDict:
    """The config with its number of data streams: that of the run in `workdir`, else one a share.

    So the run goes on with the same data on another number of processes.
    """
    if config.data.streams:
        return config
    settled = config.copy_and_resolve_references()
    record = run_record.read_record(workdir)
    recorded = record["config"]["data"] if record else {}
    settled.data.streams = recorded.get("streams") or share(mesh)[1]
    return settled


def settle_ends(config: ConfigDict, tokenizer: Tokenizer, workdir: epath.Path) -> ConfigDict:
    """The config with the end and the beginning of text that a tokenizer.json declares.

    A tokenizer_config.json that declared them is not in the work directory. A run of an older
    commit in `workdir` keeps what it guessed, where that is what is declared.
    """
    ends = ("", "")
    if isinstance(tokenizer, Subwords):
        ends = (tokenizer.end_of_text_token, tokenizer.beginning_of_text_token)
    record = run_record.read_record(workdir)
    older = record and record["config"]["data"]["end_of_text"] == GUESSED
    if older and (not any(ends) or ends == (tokenizer.guess, tokenizer.guess)):
        ends = (GUESSED, GUESSED)
    if not any(ends):
        return config
    settled = config.copy_and_resolve_references()
    settled.data.end_of_text, settled.data.beginning_of_text = ends
    return settled


def resolved(config: ConfigDict, tokenizer: Any, built: experiment.Experiment) -> dict[str, Any]:
    """What config.json holds: the config, its vocabulary, and the packages that ran."""
    carried = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", built.abstract_state().objective)
    return {
        "format": compatibility.FORMAT,
        "config": config.to_dict(),
        "vocab_size": built.model.config.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "chat_template": fingerprint([(tokenizer.chat_template or CHATML).encode()]),
        "must_match": {**built.objective.must_match, "state": str(carried)},
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def as_text(record: dict[str, Any]) -> str:
    """The content of config.json."""
    return strict_json.dumps(record, indent=2) + "\n"


def check_writable(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Makes the folder and tries, on process 0, to write what the run will begin with.

    Raises:
      InputError: on all processes, if that fails.
    """
    refusal = ""
    if jax.process_index() == 0:
        probe = workdir / "config.json.new"
        try:
            with writing(f"--workdir={workdir}"):
                workdir.mkdir(parents=True, exist_ok=True)
                probe.write_text(as_text(record))
        except StorageError as error:
            refusal = str(error)
        with contextlib.suppress(OSError):
            probe.unlink()
    if refusal := first_message(refusal):
        raise InputError(refusal)


def check_workdir(workdir: epath.Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of the run in `workdir`, {} where there is none.

    Raises:
      InputError: it holds checkpoints that this config cannot go on from.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file; give a folder")
    recorded = run_record.read_record(workdir)
    if not recorded or not (workdir / "checkpoints").exists():
        return {}
    old, new = (dict(leaves(r)) for r in (recorded, strict_json.loads(as_text(record))))
    # The ends of text follow from the tokenizer, which is the key to name.
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key.endswith("_of_text"), key)):
        fixed = key in ("vocab_size", "tokenizer") or any(
            key == f"config.{name}" or key.startswith(f"config.{name}.") for name in _FIXED
        )
        fixed |= key == "chat_template" and key in old  # Older commits had none.
        # A reward that is newer than the run, which did not use it.
        fixed &= key in old or not re.fullmatch(r"config\.rollouts\.\w+\.\w+", key)
        if (
            fixed
            and key not in {f"config.{name}" for name in _FREE}
            and old.get(key) != new.get(key)
        ):
            raise InputError(_other(workdir, key, old, new))
    # Objectives that predict the same distribution and carry the same state can be exchanged: a
    # trained run may go on to forget.
    for name, value in record["must_match"].items():
        if old.get(f"must_match.{name}") != value:
            decides = {"prediction": "loss", "state": "weighting"}.get(name, name)
            names = [f"config.objective.{key}" for key in ("name", decides)]
            others = [key for key in new if key.startswith("config.objective.")]
            keys = (*names, *others, f"must_match.{name}")
            key = next(key for key in keys if old.get(key) != new.get(key))
            raise InputError(_other(workdir, key, old, new))
    return recorded


def _other(workdir: epath.Path, key: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    return (
        f"{workdir} holds checkpoints with {key.removeprefix('config.')}={old.get(key)}, not "
        f"{new.get(key)}: give the same, or another --workdir"
    )
