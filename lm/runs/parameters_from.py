"""A run that begins with the parameters of another model: `initialise.from`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from lm.data.tokenizers import Subwords, Tokenizer
from lm.errors import InputError
from lm.model.adapters import merge, merged_config
from lm.model.packed_matrix import unpack_all
from lm.model.transformer import make_model
from lm.parallel.mesh import RULES
from lm.pretrained.load import check_rows, grown_vocabulary, load_params
from lm.pretrained.source import is_pretrained, open_pretrained
from lm.pretrained.start import OF_THE_MACHINE
from lm.runs import run_record
from lm.training import experiment
from lm.training.state import TrainState, average_as_model

_KEY = "initialise.from"

# Adapters that are not those of the run that begins are merged.
_ADAPTERS = ("adapter_rank", "adapter_alpha", "adapter_matrices", "adapter_dropout")


class Beginning(NamedTuple):
    """The model that a run begins with: its name for a message, and a function that reads it."""

    where: str
    read: Callable[[Callable[[str], None]], Any]


def open_parameters(run: experiment.Experiment, tokenizer: Tokenizer) -> Beginning:
    """Looks at the other model, and reads none of its parameters.

    Args:
      run: the run that begins.
      tokenizer: of that run.

    Raises:
      InputError: there is no such model, or it has another architecture or tokenizer.
    """
    path = run.config.initialise["from"]
    if run.config.quantization["from"]:
        raise InputError(f"{_KEY} and quantization.from are two beginnings: set one of them")
    if not is_pretrained(path):
        return _from_run(run, tokenizer, path)
    found = open_pretrained(path)
    _check_section(run, found.section, path)
    _check_tokenizer(tokenizer, found.tokenizer, path)
    base = make_model(merged_config(run.model.config), RULES)
    check_rows(found, base)
    return Beginning(path, lambda say: load_params(found, base, run.mesh))


def begin(
    run: experiment.Experiment, beginning: Beginning, say: Callable[[str], None]
) -> TrainState:
    """A fresh train state with the parameters of the other model."""
    params = beginning.read(say)
    say(f"starts with the parameters of {beginning.where}")
    shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
    # Packed matrices cannot take the place of the weights that they are made of.
    donated = () if run.config.train.frozen != "as_is" else (1,)
    begin = jax.jit(run.init, out_shardings=shardings, donate_argnums=donated)
    return begin(jax.random.key(run.config.train.seed), params)


def _from_run(run, tokenizer, path) -> Beginning:
    record = run_record.read(path, _KEY)
    _check_section(run, record.config.model.to_dict(), path)
    if record.tokenizer != tokenizer.fingerprint:
        definition = epath.Path(path) / "tokenizer.json"
        if not definition.exists():
            raise InputError(f"{_KEY}={path} was trained with data.tokenizer={record.tokenizer}")
        ends = record.config.data.end_of_text, record.config.data.beginning_of_text
        its = Subwords(definition.read_text(), str(definition), *ends)
        _check_tokenizer(tokenizer, its, path)
    if record.vocab_size > run.model.config.vocab_size:
        raise InputError(
            f"{_KEY}={path} has a vocabulary of {record.vocab_size:,}, more than the "
            f"{run.model.config.vocab_size:,} of this run; give data.vocab_size={record.vocab_size}"
        )

    its, base = record.config.model, merged_config(run.model.config)
    same_adapters = all(its[key] == run.config.model[key] for key in _ADAPTERS)

    def read(say):
        config = record.config.copy_and_resolve_references()
        config.mesh = run.config.mesh
        other = experiment.build(config, record.vocab_size, run.mesh.devices.ravel())
        fields = run_record.parameters(config)
        old = run_record.restore(record, other.abstract_state(), _KEY, say, fields=fields)
        averaged = config.train.ema_decay > 0
        params = (average_as_model(other.model, old.ema) if averaged else old.trained).params
        if same_adapters:
            return grown_vocabulary(jax.jit(unpack_all)(params), run.model, run.mesh)
        merged = jax.jit(functools.partial(merge, other.model.config))(params)
        return grown_vocabulary(merged, make_model(base, RULES), run.mesh)

    return Beginning(str(record.folder), read)


def _check_section(run: experiment.Experiment, section: dict[str, Any], path: str) -> None:
    ours = run.config.model
    for key, value in section.items():
        if key not in (*OF_THE_MACHINE, *_ADAPTERS) and ours[key] != value:
            raise InputError(
                f"{_KEY}={path} has model.{key}={value}, not {ours[key]}; "
                f"--config=configs/finetune.py:{path} takes its whole model section"
            )


def _check_tokenizer(ours: Tokenizer, its: Subwords, path: str) -> None:
    """Every token of the other model must be a token of this run, by the same id."""
    if ours.fingerprint == its.fingerprint:
        return
    known = ours.vocabulary() if isinstance(ours, Subwords) else {}
    other = [token for token, index in its.vocabulary().items() if known.get(token) != index]
    if other:
        raise InputError(
            f"{_KEY}={path} has another tokenizer than data.tokenizer: {len(other):,} of its "
            f"tokens, such as {other[0]!r:.40}, have another id or none"
        )
