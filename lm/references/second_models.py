"""The sources of a run's references, opened: second models and stored scores."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from lm.data import scores
from lm.data.documents import Corpus
from lm.data.pairs import MISMATCHED
from lm.errors import InputError
from lm.model.trained import Trained
from lm.pretrained.load import load_params
from lm.pretrained.source import is_pretrained, open_pretrained
from lm.references.sources import BASE, EMA, LOSSES, SOURCES, stored_arrays, valid_sources
from lm.runs import run_record
from lm.training.experiment import Experiment, build
from objectives.losses.base import softmax


class SecondModel(NamedTuple):
    """A frozen model that a reference is computed with.

    Attributes:
      key: of the config, which names the model.
      run: the functions of its config, on the mesh of the run that compares with it.
      read: (say, step or None for the newest) -> (what was trained, its step).
    """

    key: str
    run: Experiment
    read: Callable[[Callable[[str], None], int | None], tuple[Trained, int]]


class References(NamedTuple):
    """Where the references of a run come from, besides its own moving average.

    Attributes:
      models: source (a work directory, as the config has it) -> the model in it.
      scores: name of a reference -> its folder of scores.
    """

    models: dict[str, SecondModel]
    scores: dict[str, scores.Scores]

    def abstract(self) -> dict[str, Trained]:
        """Shapes, dtypes and shardings of what `restore` gives, without allocating it."""
        return {
            source: Trained(one.run.abstract_state().trained.params)
            for source, one in self.models.items()
        }

    def fields(self) -> dict[str, scores.Field]:
        """Name of what a batch gets of stored scores -> its type and width."""
        return {
            array: dict(zip(one.names, one.fields, strict=True)).get(array, scores.Field())
            for name, one in self.scores.items()
            for array in stored_arrays(name)
        }

    def restore(
        self, say: Callable[[str], None], steps: dict[str, int]
    ) -> tuple[dict[str, Trained], dict[str, int]]:
        """What was trained of each second model, on the mesh of the run, and at which step.

        It is the moving average where that run keeps one, with weights on their grids where it was
        saved in its quantized phase.

        Args:
          say: shows one line.
          steps: source -> step of the checkpoint to take; the newest where there is none.

        Raises:
          InputError: there is no such checkpoint, or it cannot be read.
        """
        trained, found = {}, {}
        for source, one in self.models.items():
            trained[source], found[source] = one.read(say, steps.get(source))
        return trained, found

    def stored(self, corpora: Sequence[Corpus], tokenizer: str) -> dict[str, list[scores.Stored]]:
        """Name of what a batch gets -> its stored scores, one a corpus.

        Raises:
          InputError: they are those of another corpus or tokenizer.
        """
        found = {}
        for name, one in self.scores.items():
            try:
                for array in stored_arrays(name):
                    found[array] = scores.stored(one, array, corpora, tokenizer)
            except InputError as error:
                raise InputError(f"objective.references.{name}: {error}") from None
        return found


def open_references(run: Experiment, tokenizer: str | None = None) -> References:
    """Looks at the sources of all references that a run needs, and allocates nothing.

    Args:
      run: from `experiment.build`; second models get its mesh.
      tokenizer: fingerprint of the run's tokenizer; None to plan without one.

    Raises:
      InputError: a source is nothing that can be one, or a model of other tokens.
    """
    models, stored = {}, {}
    for name in run.references():
        source, key = run.config.objective.references[name], f"objective.references.{name}"
        if source == BASE and run.objective.loss.predict is not softmax:
            raise InputError(
                f"{key}={source!r}: objective.loss={run.config.objective.loss!r} has a head that "
                "is trained, so that the model below the adapters is no model of its own"
            )
        if source in (EMA, BASE):
            continue
        if "scores" in SOURCES[name] and scores.is_scores(source):
            if MISMATCHED in run.objective.batch_keys:
                raise InputError(
                    f"{key}={source!r} holds no losses of answers under other prompts, which "
                    f"objective.name={run.config.objective.name!r} compares; valid: a model"
                )
            if name in run.objective.computed_references:
                raise InputError(
                    f"{key}={source!r} is of answers as they are, and objective.name="
                    f"{run.config.objective.name!r} replaces tokens of them; valid: a model"
                )
            try:
                stored[name] = scores.load(source)
            except InputError as error:
                raise InputError(f"{key}: {error}") from None
        elif "model" in SOURCES[name] and is_pretrained(source):
            models[source] = _open_pretrained(run, key, source, tokenizer)
        elif "model" in SOURCES[name] and run_record.is_run(source):
            models[source] = _open_run(run, key, source, tokenizer)
        else:
            raise InputError(f"{key}={source!r} is none of: {valid_sources(name)}")
    if run.objective.loss.same_width:
        _check_widths(run, {s: one for s, one in models.items() if _teaches(run, s)})
    return References(models, stored)


def check_tokens(
    named: str, its: tuple[int, str], ours: tuple[int, str], instead: str = ""
) -> None:
    """Refuses a model that does not speak of the same tokens.

    Args:
      named: the model as the user has named it.
      its: entries of its vocabulary, and its tokenizer's fingerprint.
      ours: the same of the run.
      instead: what else would be valid, in words.

    Raises:
      InputError: they differ.
    """
    for what, one, other in zip(("vocabulary", "tokenizer"), its, ours, strict=True):
        if one != other:
            raise InputError(
                f"{named} has the {what} {one}, not {other}; valid: a run with the same tokenizer"
                f"{instead}"
            )


def _teaches(run: Experiment, source: str) -> bool:
    references = run.config.objective.references
    return source in [references[name] for name in run.objective.teachers]


def _check_widths(run: Experiment, teachers: dict[str, SecondModel]) -> None:
    """Refuses teachers whose hidden states cannot be compared with the run's."""
    width = run.model.config.width
    for source, one in teachers.items():
        if (its := one.run.model.config.width) != width:
            raise InputError(
                f"objective.loss={run.config.objective.loss!r} compares hidden states, and "
                f"{one.key}={source} has model.width={its}; valid: a teacher of width {width}"
            )


def _instead(key: str) -> str:
    """How a model of other tokens could still be what `key` names."""
    if key.rpartition(".")[2] in LOSSES:
        return ""
    return ", or objective.name='alm' or objective.loss='uld', which compare models of other tokens"


def _open_pretrained(run: Experiment, key: str, source: str, tokenizer: str | None) -> SecondModel:
    found = open_pretrained(source)
    its = (found.vocab_size, found.tokenizer.fingerprint)
    ours = (run.model.config.vocab_size, tokenizer or found.tokenizer.fingerprint)
    check_tokens(f"{key}={source}", its, ours, _instead(key))
    config = ConfigDict(run.config.to_dict())
    config.model.update(found.section | {"adapter_rank": 0})
    config.objective.update(name="weighted", loss="cross_entropy", weighting="uniform")
    config.quantization.update(bits=16.0, widths="", adapt_every=0, begin_with="weights")
    config.quantization.update(activations="none", cache="none")
    config.train.update(trainable="", frozen="as_is", ema_decay=0.0)
    config.mesh.update(data=1, fsdp=1, tensor=1, sequence=1)
    own = build(config, found.vocab_size, devices=1)._replace(mesh=run.mesh)

    def read(say, step):
        del say, step
        return Trained(load_params(found, own.model, own.mesh)), 0

    return SecondModel(key, own, read)


def _open_run(run: Experiment, key: str, source: str, tokenizer: str | None) -> SecondModel:
    record = run_record.read(source, key)
    vocab_size = run.model.config.vocab_size
    its = (record.vocab_size, record.tokenizer)
    ours = (vocab_size, tokenizer or record.tokenizer)
    check_tokens(f"{key}={source}", its, ours, _instead(key))
    try:
        # The mesh of its own training does not matter.
        record.config.mesh.update(data=1, fsdp=1, tensor=1, sequence=1)
        own = build(record.config, vocab_size, devices=1)
    except InputError as error:
        raise InputError(f"{key}={source}: {error}") from None
    if own.objective.loss.predict is not softmax:
        raise InputError(
            f"{key}={source} was trained with objective.loss={record.config.objective.loss!r}, "
            "whose head is another: a reference needs a softmax of products"
        )
    own = own._replace(mesh=run.mesh)

    def read(say, step):
        fields = run_record.parameters(own.config)
        state = run_record.restore(record, own.abstract_state(), key, say, step, fields=fields)
        return Trained(own.plain(state).params), int(state.step)

    return SecondModel(key, own, read)
