"""Stores what a trained model says of every token beside a corpus, as a reference for training.

python -m launch.score --model=runs/reference --output=runs/reference_scores
python -m launch.train ... --config.objective.references.reference_nll=runs/reference_scores

Of a teacher: its largest probabilities, for top_k_distillation.

python -m launch.score --model=runs/teacher --name=teacher_top_k --largest=64 --output=runs/top_k

Of a teacher with another tokenizer, at the positions of a student's, for alm and uld:

python -m launch.score --model=runs/teacher --name=chunk_log_probability
    --config=configs/distillation/alm.py --output=runs/chunks
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from launch import command, workdir
from lm.errors import InputError

_AGAINST = flags.DEFINE_string(
    "against", "", "Run of wrong answers: store contrast_probability, --workdir's being the right."
)
_FAULTY = flags.DEFINE_string(
    "faulty", "", "FILE.jsonl of faulty answers: store error_mask and faulty_log_probability."
)
_WITHOUT_CONTEXT = flags.DEFINE_bool(
    "without_context", False, "Score only the spans of nonzero weight, without the prompt."
)
_LARGEST = flags.DEFINE_integer(
    "largest", 64, "teacher_top_k, teacher_sorted: how many of the largest probabilities to store."
)

_MERGE = flags.DEFINE_float(
    "merge",
    0.0,
    "chunk_log_probability: a chunk goes on where the teacher gives at most this probability to a "
    "token that begins with a space; 0 is off.",
)

# References at the positions of another tokenizer, that of the config.
_ACROSS = ("teacher_sorted", "chunk_log_probability")


def main() -> None:
    """Scores every document once and says how the result is used."""
    output = command.OUTPUT.value
    if not output:
        raise InputError("--output=FOLDER is missing: the folder of scores to make")
    split = command.split("train")
    command.use_compilation_cache()
    import jax

    from lm.data import scores
    from lm.parallel.mesh import put_batch
    from lm.references import sources

    references = _references()
    try:
        scores.check_new(output)
    except InputError as error:
        raise InputError(f"--output={error}") from None
    loaded = workdir.load_chosen()
    c, mesh = loaded.config, loaded.run.mesh
    texts, tokenizer = _texts(references[0], split, loaded)
    trained, compute, origin = _scorer(references[0], loaded)
    compute = jax.jit(compute)
    score, options = _score(references[0])
    documents = sum(len(corpus.documents) for corpus in texts)
    names = [array for name in references for array in sources.stored_arrays(name)]
    command.say(f"scoring {documents:,} documents at step {loaded.step}")
    with jax.set_mesh(mesh):
        totals = _Totals(
            names,
            score(
                lambda batch: compute(trained, put_batch(mesh, batch)),
                texts,
                tokenizer=tokenizer,
                batch_size=c.train.batch_size // c.train.accumulation,
                sequence_length=c.data.sequence_length,
                **options(loaded.tokenizer),
            ),
        )
        fields = _fields(references[0])
        scores.write(output, texts, tokenizer.fingerprint, names, totals, origin, fields)
    totals.show(documents)
    print(f"scores: {output}")
    keys = (f"--config.objective.references.{name}={output}" for name in references)
    print(f"next: python -m launch.train ... {' '.join(keys)}")


def _references() -> list[str]:
    """The references that are stored."""
    from lm.references import sources

    if _FAULTY.value:
        if command.NAME.value or _AGAINST.value or _WITHOUT_CONTEXT.value:
            raise InputError("--faulty goes with none of --name, --against, --without_context")
        return ["error_mask", "faulty_log_probability"]
    default, valid = "reference_nll", (*sources.LOSSES, "likelihood", "teacher_top_k", *_ACROSS)
    if _WITHOUT_CONTEXT.value:
        default = "prior_nll"
    if _AGAINST.value:
        default, valid = "contrast_probability", ("contrast_probability",)
    name = command.NAME.value or default
    if name not in valid:
        raise InputError(f"--name={name} is not one of: {', '.join(valid)}")
    if (name in _ACROSS) != (command.CONFIG.value is not None):
        raise InputError(
            f"--name={name} is at the positions of a student with a tokenizer of its own: "
            "--config=FILE.py of its training is missing"
            if name in _ACROSS
            else f"--config is for --name={' and --name='.join(_ACROSS)}"
        )
    if name in _ACROSS and (command.CORPUS.value or _WITHOUT_CONTEXT.value):
        raise InputError(
            f"--name={name} goes with neither --corpus nor --without_context; for other text there "
            "is --config.data.corpus"
        )
    if not 0 <= _MERGE.value < 1 or (_MERGE.value and name != "chunk_log_probability"):
        raise InputError(
            f"--merge={_MERGE.value} must be at least 0 and below 1, and is for "
            "--name=chunk_log_probability"
        )
    if _LARGEST.present and name not in ("teacher_top_k", "teacher_sorted"):
        raise InputError(
            f"--largest={_LARGEST.value} is for --name=teacher_top_k and --name=teacher_sorted"
        )
    if _LARGEST.value < 1:
        raise InputError(f"--largest={_LARGEST.value} must be at least 1")
    return [name]


def _texts(name: str, split: str, loaded: workdir.Loaded) -> tuple[Sequence[Any], Any]:
    """The corpora that are scored, and the tokenizer whose positions they have."""
    from lm.data import corpora
    from lm.training import experiment

    if name in _ACROSS:
        data = experiment.load_data(command.CONFIG.value.data)
        return data.validation if split == "validation" else data.train, data.tokenizer
    c = loaded.config
    texts = corpora.load(
        command.CORPUS.value or c.data.corpus,
        split,
        directory=c.data.directory,
        validation_fraction=c.data.validation_fraction,
    )
    return texts, loaded.tokenizer


def _score(name: str) -> tuple[Callable[..., Any], Callable[..., dict[str, Any]]]:
    """What yields the values of documents, and (tokenizer of the model) -> its options."""
    from lm.data import corpora
    from lm.references import scoring

    if _FAULTY.value:
        faulty = corpora.read(_FAULTY.value)
        return scoring.score_faults, lambda tokenizer: {"faulty": faulty}
    if name in _ACROSS:
        given = {"chunks": name == "chunk_log_probability", "merge": _MERGE.value}
        return scoring.score_across, lambda tokenizer: {"teacher": tokenizer, **given}
    without = _WITHOUT_CONTEXT.value
    return scoring.score_documents, lambda tokenizer: {"without_context": without}


def _fields(name: str) -> dict[str, Any]:
    """Name of what is not one float32 a position -> its type and width."""
    from lm.data.scores import Field

    probabilities = Field("float32", _LARGEST.value)
    if name == "teacher_top_k":
        ids = Field("int32", _LARGEST.value)
        return {"teacher_ids": ids, "teacher_log_probabilities": probabilities}
    return {"teacher_sorted": probabilities} if name == "teacher_sorted" else {}


def _scorer(name: str, loaded: workdir.Loaded) -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """What was trained, (trained, batch) -> values [B, T], and where they come from."""
    import jax.numpy as jnp

    from lm.data import alignment
    from lm.references import scoring
    from lm.references.second_models import check_tokens
    from lm.training.forward import make_prediction_statistics

    def plain(one):
        return one.run.plain(one.state)._replace(scales=())

    model, c = loaded.run.model, loaded.config
    origin = {
        "workdir": command.chosen(),
        "step": loaded.step,
        "split": command.split("train"),
        "sequence_length": c.data.sequence_length,
        "without_context": _WITHOUT_CONTEXT.value,
    }
    if _FAULTY.value:
        origin["faulty"] = _FAULTY.value
    if _AGAINST.value:
        other = workdir.load(_AGAINST.value, flag="--against")
        theirs, ours = (
            (one.run.model.config.vocab_size, one.tokenizer.fingerprint) for one in (other, loaded)
        )
        check_tokens(f"--against={_AGAINST.value}", theirs, ours)
        origin |= {"against": _AGAINST.value, "against_step": other.step}
        contrast = scoring.make_contrast(model, other.run.model)
        return (plain(loaded), plain(other)), contrast, origin
    if name in ("teacher_top_k", "teacher_sorted"):
        origin["largest"] = _LARGEST.value
        return plain(loaded), _make_largest(name, loaded), origin
    statistics = make_prediction_statistics(
        model, c.objective.block_size, None, loaded.run.objective.loss
    )
    change = {"likelihood": lambda nll: jnp.exp(-nll), "chunk_log_probability": jnp.negative}

    def values(trained, batch):
        nll_BT = statistics(trained, batch).nll
        return change[name](nll_BT) if name in change else nll_BT

    if not _MERGE.value:
        return plain(loaded), values, origin
    _check_head(name, loaded)
    origin["merge"] = _MERGE.value
    entries = alignment.spaces(loaded.tokenizer)
    mass = scoring.make_mass(model, entries, loaded.run.objective.loss)
    return plain(loaded), lambda *x: (values(*x), mass(*x)), origin


def _check_head(name: str, loaded: workdir.Loaded) -> None:
    from objectives.losses.base import softmax

    if loaded.run.objective.loss.predict is not softmax:
        raise InputError(
            f"{command.chosen()} was trained with objective.loss={loaded.config.objective.loss!r}, "
            f"whose head is another: --name={name} needs a softmax of products"
        )


def _make_largest(name: str, loaded: workdir.Loaded) -> Callable[..., Any]:
    """(trained, batch) -> the largest probabilities, as the reference has them."""
    import jax.numpy as jnp

    from lm.references import scoring

    loss, entries = loaded.run.objective.loss, loaded.tokenizer.vocab_size
    _check_head(name, loaded)
    if name == "teacher_top_k" and _LARGEST.value > entries:
        raise InputError(f"--largest={_LARGEST.value} is more than the {entries} tokens there are")
    count = min(_LARGEST.value, entries)
    largest = scoring.make_largest(loaded.run.model, count, entries, loss)
    if name == "teacher_top_k":
        return largest
    # The student may have more tokens than the teacher.
    fill = ((0, 0), (0, 0), (0, _LARGEST.value - count))
    return lambda trained, batch: jnp.pad(jnp.exp(largest(trained, batch)[1]), fill)


class _Totals:
    """Passes scores on, and adds them up by name; of the largest probabilities, their sum."""

    def __init__(self, names: Sequence[str], values: Iterable[Any]):
        self._names, self._values = names, values
        self._counts, self._sums = np.zeros(len(names), int), np.zeros(len(names))

    def __iter__(self) -> Iterator[Any]:
        for one in self._values:
            arrays = one if isinstance(one, tuple) else one.reshape(len(self._names), -1)
            for i, (name, x) in enumerate(zip(self._names, arrays, strict=True)):
                x = np.exp(x) if name == "teacher_log_probabilities" else x
                x = x if x.ndim == 1 else x.sum(-1)
                self._counts[i] += np.count_nonzero(~np.isnan(x))
                self._sums[i] += np.nansum(x, dtype=np.float64)
            yield one

    def show(self, documents: int) -> None:
        """Prints a line a name."""
        for name, count, total in zip(self._names, self._counts, self._sums, strict=True):
            mean = f"mean {total / max(count, 1):.4f}"
            if name in ("teacher_log_probabilities", "teacher_sorted"):
                mean = f"mean sum of the probabilities {total / max(count, 1):.4f}"
            if name != "teacher_ids":
                print(f"{name}: {count:,} values of {documents:,} documents, {mean}")


if __name__ == "__main__":
    command.run(main)
