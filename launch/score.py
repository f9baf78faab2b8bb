"""Stores per-token losses of a trained run beside a corpus, as a reference for training.

python -m launch.score --model=runs/reference --output=runs/reference_scores
python -m launch.train ... --config.objective.references.reference_nll=runs/reference_scores
"""

from collections.abc import Callable, Iterable, Iterator
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


def main() -> None:
    """Scores every document once and says how the result is used."""
    output = command.OUTPUT.value
    if not output:
        raise InputError("--output=FOLDER is missing: the folder of scores to make")
    split = command.split("train")
    command.use_compilation_cache()
    import jax

    from lm.data import corpora, scores
    from lm.parallel.mesh import put_batch
    from lm.references import scoring

    names = _names()
    try:
        scores.check_new(output)
    except InputError as error:
        raise InputError(f"--output={error}") from None
    loaded = workdir.load_chosen()
    c, mesh = loaded.config, loaded.run.mesh
    trained, compute, origin = _scorer(names[0], loaded)
    compute = jax.jit(compute)
    texts = corpora.load(
        command.CORPUS.value or c.data.corpus,
        split,
        directory=c.data.directory,
        validation_fraction=c.data.validation_fraction,
    )
    documents = sum(len(corpus.documents) for corpus in texts)
    score = scoring.score_documents
    options = {"without_context": _WITHOUT_CONTEXT.value}
    if _FAULTY.value:
        score, options = scoring.score_faults, {"faulty": corpora.read(_FAULTY.value)}
    command.say(f"scoring {documents:,} documents at step {loaded.step}")
    with jax.set_mesh(mesh):
        totals = _Totals(
            len(names),
            score(
                lambda batch: compute(trained, put_batch(mesh, batch)),
                texts,
                tokenizer=loaded.tokenizer,
                batch_size=c.train.batch_size // c.train.accumulation,
                sequence_length=c.data.sequence_length,
                **options,
            ),
        )
        scores.write(output, texts, loaded.tokenizer.fingerprint, names, totals, origin)
    for name, count, total in zip(names, totals.counts, totals.sums, strict=True):
        mean = total / max(count, 1)
        print(f"{name}: {count:,} values of {documents:,} documents, mean {mean:.4f}")
    print(f"scores: {output}")
    keys = (f"--config.objective.references.{name}={output}" for name in names)
    print(f"next: python -m launch.train ... {' '.join(keys)}")


def _names() -> list[str]:
    """The references that are stored."""
    from lm.references import sources

    if _FAULTY.value:
        if command.NAME.value or _AGAINST.value or _WITHOUT_CONTEXT.value:
            raise InputError("--faulty goes with none of --name, --against, --without_context")
        return ["error_mask", "faulty_log_probability"]
    default, valid = "reference_nll", (*sources.LOSSES, "likelihood")
    if _WITHOUT_CONTEXT.value:
        default = "prior_nll"
    if _AGAINST.value:
        default, valid = "contrast_probability", ("contrast_probability",)
    name = command.NAME.value or default
    if name not in valid:
        raise InputError(f"--name={name} is not one of: {', '.join(valid)}")
    return [name]


def _scorer(name: str, loaded: workdir.Loaded) -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """What was trained, (trained, batch) -> values [B, T], and where they come from."""
    import jax.numpy as jnp

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
    statistics = make_prediction_statistics(
        model, c.objective.block_size, None, loaded.run.objective.loss
    )

    def values(trained, batch):
        nll_BT = statistics(trained, batch).nll
        return jnp.exp(-nll_BT) if name == "likelihood" else nll_BT

    return plain(loaded), values, origin


class _Totals:
    """Passes scores on, and adds them up by name."""

    def __init__(self, names: int, values: Iterable[np.ndarray]):
        self._values = values
        self.counts, self.sums = np.zeros(names, int), np.zeros(names)

    def __iter__(self) -> Iterator[np.ndarray]:
        for one in self._values:
            rows = one.reshape(len(self.sums), -1)
            self.counts += np.count_nonzero(~np.isnan(rows), axis=1)
            self.sums += np.nansum(rows, axis=1, dtype=np.float64)
            yield one


if __name__ == "__main__":
    command.run(main)
