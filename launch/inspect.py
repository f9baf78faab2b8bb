"""Writes a self-contained HTML page of a text, with tokens coloured by weight and by loss.

python -m launch.inspect --model=runs/quickstart --text=FILE [--output=inspect.html]

With a run of a preference objective and records of preferences, the page shows the answers of each
record side by side, with tokens coloured by their log-ratio and by what the objective does to them.
With a run of a policy gradient and problems (records with a prompt and an answer, or task:NAME), it
shows one rollout: the answers that the model draws, with their rewards, coloured in the same way.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict

from launch import command, workdir
from lm.errors import InputError
from lm.flat import leaves

if TYPE_CHECKING:
    from launch.page import Heading
    from lm.data.corpora import Corpus
    from lm.data.pairs import Reading
    from lm.references.second_models import References
    from lm.training.experiment import Experiment

_TEXT = flags.DEFINE_string(
    "text", None, "What to look at: a text file, a FILE.jsonl, a folder or task:NAME."
)
_WEIGHTING = flags.DEFINE_string("weighting", "", "As objective.weighting; that of the run if not.")
_OBJECTIVE = flags.DEFINE_multi_string(
    "objective", [], "KEY=VALUE of the run's objective section, such as rho1.keep=0.3; repeatable."
)


def main() -> None:
    """Writes the page of --text."""
    if not _TEXT.value:
        raise InputError("--text=FILE is missing: a text file, a FILE.jsonl or a folder")
    output = Path(command.OUTPUT.value or "inspect.html")
    if not output.parent.is_dir() or output.is_dir():
        raise InputError(f"--output={output} is not a file in a folder that is there")
    command.use_compilation_cache()
    from launch.page import Heading
    from lm.data import corpora
    from lm.data.pairs import check_kinds
    from lm.data.tasks.corpus import PREFIX
    from lm.references.second_models import open_references
    from lm.training import make_objective

    corpus = corpora.read(_TEXT.value)
    loaded = workdir.load_chosen(fields=("trained",))
    c = loaded.config
    overrides = [f"weighting={_WEIGHTING.value}"] * bool(_WEIGHTING.value) + _OBJECTIVE.value
    for override in overrides:
        _override(c.objective, override)
    run = loaded.run._replace(objective=make_objective.make_objective(c))
    reading = make_objective.preference_reading(c, run.objective)
    check_kinds([corpus], reading)
    references = open_references(run, loaded.tokenizer.fingerprint)
    for name in references.scores:
        raise InputError(_no_scores(name))
    weighted = not reading and run.objective.advantages is None
    described = make_objective.describe_weighting if weighted else make_objective.describe_objective
    weighting = described(c)
    for name in run.references():
        weighting += f", {name} from {Path(c.objective.references[name]).name}"
    task = _TEXT.value.startswith(PREFIX)
    source = _TEXT.value if task else Path(_TEXT.value).name
    folder = Path(command.chosen()).name
    heading = Heading(source, folder, loaded.step, weighting)
    content, said = _page(loaded, run, corpus, reading, references, heading)
    command.write_text(output, content)
    print(said)
    print(f"page: {output}")


def _page(
    loaded: workdir.Loaded,
    run: "Experiment",
    corpus: "Corpus",
    reading: "Reading | None",
    references: "References",
    heading: "Heading",
) -> tuple[str, str]:
    """The page, and one line about what is on it: of text, of preferences or of a rollout."""
    import jax

    from launch import page, pair_page, policy_page
    from lm.data.problems import problems
    from lm.references import inspection, pair_inspection
    from lm.rollouts.inspection import inspect_rollout
    from lm.rollouts.judging import judging

    with jax.set_mesh(run.mesh), judging(run.config, run.objective) as judge:
        frozen, _ = references.restore(command.say, {})
        second_models = {
            source: (one.run.model, frozen[source]) for source, one in references.models.items()
        }
        if run.objective.advantages is not None:
            asked = problems([corpus]), loaded.tokenizer, judge, command.say
            found = inspect_rollout(run, loaded.state, *asked, second_models)
            reward = found.metrics["reward"]
            content = policy_page.render(found, loaded.tokenizer, heading)
            return content, f"{len(asked[0]):,} problems, mean reward {reward:.4f}"
        documents = list(corpus.documents)
        given = documents, loaded.tokenizer
        if reading:
            found = pair_inspection.inspect_pairs(run, loaded.state, *given, reading, second_models)
            content = pair_page.render(found, loaded.tokenizer, heading)
            return content, f"{len(found.documents):,} of {len(documents):,} records"
        found = inspection.inspect(run, loaded.state, *given, second_models)
        targets, kept = found.metrics["targets"], found.metrics["kept_share"]
        content = page.render(found, documents, loaded.tokenizer, heading)
        return content, f"{targets:,.0f} targets, {kept:.1%} kept"


def _no_scores(name: str) -> str:
    """Why a reference that is stored cannot be shown, and what can be."""
    from lm.references.sources import valid_sources

    key = f"objective.references.{name}"
    why = f"{key} is a folder of scores, which has those of its own corpus only"
    if others := valid_sources(name, stored=False):
        return f"{why}; valid here: --objective={key.partition('.')[2]}=SOURCE, one of {others}"
    return (
        f"{why}, and can be nothing else: what needs it has no page; valid: another "
        "--objective=name=NAME or --objective=loss=LOSS"
    )


def _override(objective: ConfigDict, override: str) -> None:
    """Sets a key of the objective section; the value gets the type of the default.

    Args:
      objective: the section.
      override: KEY=VALUE.

    Raises:
      InputError: there is no such key, or the value has another type.
    """
    key, _, value = override.partition("=")
    valid = dict(leaves(objective))
    if key not in valid:
        raise InputError(f"--objective={override}: no such key{command.nearest(key, [*valid])}")
    kind = type(valid[key])
    try:
        parsed = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise InputError(f"--objective={override}: {value!r} is no {kind.__name__}") from None
    objective.update_from_flattened_dict({key: parsed})


if __name__ == "__main__":
    command.run(main)
