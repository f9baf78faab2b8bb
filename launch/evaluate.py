"""Loss, perplexity and bits per byte of a trained run on a split of its corpus, or on other text.

python -m launch.evaluate --model=runs/quickstart
python -m launch.evaluate --model=runs/quickstart/int4.safetensors
"""

from collections.abc import Sequence
from typing import Any

from launch import command, workdir
from lm.data.documents import Corpus
from lm.errors import InputError


def main() -> None:
    """Evaluates and prints one line a figure."""
    split = command.split("validation")
    command.use_compilation_cache()
    import jax

    from lm.data import corpora
    from lm.evaluation import perplexity
    from lm.training import experiment

    loaded = workdir.load_chosen()
    c = loaded.config
    texts = corpora.load(
        command.CORPUS.value or c.data.corpus,
        split,
        directory=c.data.directory,
        validation_fraction=c.data.validation_fraction,
    )
    with jax.set_mesh(loaded.run.mesh):
        terms, loaded = _terms(loaded, texts)
        trained, quantized = loaded.run.usable(loaded.state)
        score = perplexity.evaluate(
            loaded.run.eval_step(),
            trained,
            experiment.evaluation_batches(c, texts, loaded.tokenizer),
            loaded.run.mesh,
            quantized=quantized,
            terms=terms,
        )
    print(f"step {loaded.step}, {split} split of {command.CORPUS.value or c.data.corpus}")
    print(f"loss: {score.loss:.4f} nats/token over {score.weight_sum:,.0f} tokens")
    if score.quantized_loss is not None:
        print(f"in full precision: {score.full_precision_loss:.4f}")
        print(f"quantized: {score.quantized_loss:.4f}")
    print(f"perplexity: {score.perplexity:.4f}")
    print(f"bits per byte: {score.bits_per_byte:.4f}")
    for name, value in score.terms.items():
        print(f"{name}: {value:.4f}")


def _terms(loaded: workdir.Loaded, texts: Sequence[Corpus]) -> tuple[Any, workdir.Loaded]:
    """What measures the terms of the run's objective, None without; and the run that it reads."""
    if loaded.config.objective.name == "weighted":
        return None, loaded
    import jax

    from lm.references.second_models import open_references
    from lm.references.sources import EMA
    from lm.training import experiment, term_evaluation

    run, c = loaded.run, loaded.config
    try:
        references = open_references(run, loaded.tokenizer.fingerprint)
        frozen, _ = references.restore(command.say, {})
    except InputError as error:
        command.say(f"without the terms of the objective: {error}")
        return None, loaded
    models = {source: one.run.model for source, one in references.models.items()}
    reading = experiment.reading_of(c, texts)
    made = term_evaluation.term_evaluation(
        run, reading, references.scores, models, frozen, command.say
    )
    if made is None:
        return None, loaded
    averaged = EMA in {c.objective.references[name] for name in run.references()}
    fresh = run.objective.init()
    if loaded.state.objective is None and (averaged or jax.tree.leaves(fresh)):
        loaded = workdir.load_chosen(fields=("trained", "objective"))
    elif not jax.tree.leaves(fresh):
        loaded = loaded._replace(state=loaded.state._replace(objective=fresh))
    return made(loaded.state), loaded


if __name__ == "__main__":
    command.run(main)
