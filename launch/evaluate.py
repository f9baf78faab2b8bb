"""Loss, perplexity and bits per byte of a trained run on a split of its corpus, or on other text.

python -m launch.evaluate --model=runs/quickstart
python -m launch.evaluate --model=runs/quickstart/int4.safetensors

With tasks, files in the form of lm_eval's: accuracy or perplexity on them instead.

python -m launch.evaluate --model=runs/quickstart --tasks=configs/tasks/additions.yaml
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from launch import command, workdir
from lm.data.documents import Corpus
from lm.errors import InputError

_TASKS = flags.DEFINE_list("tasks", [], "Files of tasks, FILE.yaml,...: evaluate on these.")
_TASKS_OUTPUT = flags.DEFINE_string(
    "tasks_output", "", "--tasks: file of JSON to write, with what each item gave."
)
_TASKS_PAGE = flags.DEFINE_string("tasks_page", "", "--tasks: page of HTML to write.")
_LIMIT = flags.DEFINE_integer("limit", None, "--tasks: evaluate the first N items of each task.")
_BEGINNING = flags.DEFINE_enum(
    "beginning",
    "auto",
    ("auto", "always", "empty"),
    "--tasks: prompts that open with the beginning of text: always, only an empty one, or as the "
    "model was trained.",
)
_LENGTH = flags.DEFINE_integer(
    "length", 0, "--tasks: tokens that the model reads at most; 0 is as it was trained."
)


def main() -> None:
    """Evaluates and prints one line a figure."""
    if _TASKS.value:
        return _on_tasks()
    for flag in (_TASKS_OUTPUT, _TASKS_PAGE, _LIMIT, _BEGINNING, _LENGTH):
        if flag.present:
            raise InputError(f"--{flag.name} is for --tasks=FILE.yaml")
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


def _on_tasks() -> None:
    """Prints a table of the tasks, and writes them as JSON."""
    if _LIMIT.value is not None and _LIMIT.value < 1:
        raise InputError(f"--limit={_LIMIT.value} must be at least 1")
    if command.CORPUS.value or command.SPLIT.value:
        raise InputError("--tasks goes with neither --corpus nor --split")
    command.use_compilation_cache()
    import jax

    from launch import task_report
    from lm.evaluation.tasks.evaluate import check, evaluate
    from lm.evaluation.tasks.model import Programs, encoder_of
    from lm.evaluation.tasks.task import read_tasks

    for flag in (_TASKS_OUTPUT, _TASKS_PAGE):
        task_report.check_output(flag.name, flag.value)
    tasks = read_tasks(_TASKS.value, "--tasks")
    loaded = workdir.load_chosen()
    options = {"beginning": _BEGINNING.value, "length": _LENGTH.value}
    encoder = encoder_of(loaded.run, loaded.tokenizer, trained_here=loaded.step > 0, **options)
    for task in tasks:
        check(task, encoder, _LIMIT.value)
    outcomes = []
    with jax.set_mesh(loaded.run.mesh):
        trained, quantized = loaded.run.stored(loaded.state)
        machine = Programs(loaded.run, quantized, encoder).machine(trained)
        for task in tasks:
            command.say(f"{task.name}: {len(task.documents[: _LIMIT.value]):,} items")
            outcomes.append(evaluate(task, machine, _LIMIT.value))
    print("\n".join(task_report.table(outcomes)))
    about = {"model": command.chosen(), "step": loaded.step, **encoder.about()}
    if _TASKS_OUTPUT.value:
        task_report.write(_TASKS_OUTPUT.value, about, outcomes)
        print(f"items: {_TASKS_OUTPUT.value}")
    if _TASKS_PAGE.value:
        task_report.write_page(_TASKS_PAGE.value, about, outcomes)
        print(f"page: {_TASKS_PAGE.value}")


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
