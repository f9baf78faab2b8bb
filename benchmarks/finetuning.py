r"""Weightings in fine-tuning: loss on held-out chats, and what is forgotten, over seeds.

python -m benchmarks.finetuning --table=finetuning_corrupted --runs=runs/finetuning \
    [--methods=cross_entropy,rho1,ss_token,dft,glow,q_tuning,dynamic] [--seeds=0,1,2,3,4] \
    [--model=M] [--collect=docs/results] [--config.KEY=VALUE ...]

The chats are those of benchmarks/docstring_chats.py. For each seed a model of 0.5 million
parameters (configs/small.py) is trained on the sources of the standard library without the
docstrings of functions, and every method goes on from it: 1,000 chats drawn for the seed, in the
same order, for as many steps, with a loss on the answers alone. With --model all seeds begin with
that model instead, any that launch.evaluate takes; it may have read the docstrings before. The
table decides the data: finetuning_clean, or finetuning_corrupted, where 30% of the chats have the
answer of another one.

Constants are the defaults of the weightings, normalisations those of the papers; `dynamic` begins
with 5% of the steps without weights, as configs/weightings/dynamic.py. The reference of `rho1` is
the same model, trained as long on the chats of reference.jsonl, which are never corrupted and
which nothing else is trained on; the history of `ss_token` is the model begun with.

Every run is a command of launch.train with a folder of its own, and one that has ended is not run
again; further arguments are those of launch.train, for all runs but the first models. The learning
rate is the best one of cross_entropy for these: with --model give one by
--config.optimizer.peak_learning_rate. When all have ended they are measured, in the same way for
all: loss on all held-out chats, which are never corrupted, the share of the tokens of their answers
that the model ranks first, and loss on held-out sources. Prints a table of launch.benchmark_tables;
--collect writes it to a folder, with the metrics of all runs beside it, from which
`python -m launch.results --trace` makes it again.
"""

import functools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import docstring_chats
from launch import benchmark_tables, command
from lm import strict_json
from lm.data import corpora, tokenizers
from lm.training.logging import read_metrics

_RUNS = flags.DEFINE_string("runs", "runs/finetuning", "Folder of the work directories.")
_METHODS = flags.DEFINE_list(
    "methods",
    ["cross_entropy", "rho1", "ss_token", "dft", "glow", "q_tuning", "dynamic"],
    "What is compared, with the first of them.",
)
_SEEDS = flags.DEFINE_list(
    "seeds", ["0", "1", "2", "3", "4"], "Seeds of models and orders of data."
)
_TABLE = flags.DEFINE_enum(
    "table",
    "finetuning_clean",
    [name for name in benchmark_tables.TABLES if name.startswith("finetuning")],
    "Which table is made.",
)
_COLLECT = flags.DEFINE_string("collect", None, "Folder to write the table and its runs to.")

# What launch.train gets besides; the flags of this script are others.
FURTHER = [one for one in sys.argv[1:] if one.startswith("--config.")]

CHATS = 1000  # that a method is trained on, or all that there are
SHARE = 0.3  # of them: corrupted
GENERAL = 0.03  # of the sources: held out
STEPS = 120
VOCABULARY = 1024
QUIET = {
    "train.tensorboard": False,
    "evaluation.every_steps": 0,
    "evaluation.sample_tokens": 0,
    "checkpoint.every_steps": 0,
}
FIRST = QUIET | {
    "data.corpus": "{data}/text.jsonl",
    "data.validation_fraction": GENERAL,
    "data.tokenizer": "{data}/tokenizer.json",
    "data.vocab_size": 0,
}
KEYS = QUIET | {
    "data.validation_fraction": 0.01,
    "data.sequence_length": 256,
    "train.batch_size": 8,
    "train.steps": STEPS,
    "train.log_every": 20,
    "optimizer.peak_learning_rate": 3e-3,
}
REFERENCE = {"data.corpus": "{data}/reference.jsonl"}
OWN: dict[str, dict[str, Any]] = {
    "cross_entropy": {"objective.weighting": "uniform"},
    "rho1": {"objective.references.reference_nll": "{reference}"},
    "ss_token": {"objective.references.history_nll": "{first}"},
    "dft": {"objective.normalisation": "all"},
    "glow": {"objective.normalisation": "all"},
    "dynamic": {"objective.dynamic.burn_in": STEPS // 20},
}


def main() -> None:
    """Trains what is missing, measures it, and prints the table."""
    command.use_compilation_cache()
    prepare(data())
    places = {}
    for seed in _SEEDS.value:
        places["before", int(seed)] = first(seed)
        for method in _METHODS.value:
            places[method, int(seed)] = tune(method, seed)
    runs = {}
    for (name, seed), place in places.items():
        lines = [] if name == "before" else read_metrics(place)
        runs[name, seed] = [*lines, measured(place)]
    head, *rows = benchmark_tables.TABLES[_TABLE.value](runs)
    print("\n".join(command.table(head, rows)))
    if _COLLECT.value:
        written = benchmark_tables.collect(_TABLE.value, runs, Path(_COLLECT.value))
        print(f"written: {written}")


def data() -> Path:
    """The folder of the files that are trained on."""
    return Path(_RUNS.value) / "data"


def prepare(folder: Path) -> None:
    """Writes what is missing of the chats, the sources and the tokenizer of the first models."""
    if not (folder / "text.jsonl").exists():
        docstring_chats.write(folder, docstring_chats.standard_library())
    if not command.MODEL.value and not (folder / "tokenizer.json").exists():
        texts = (held_out_text("train"),)
        trained = tokenizers.load("bpe", VOCABULARY, texts, directory=str(folder))
        definition = docstring_chats.with_markers(trained.definition)
        command.write_text(folder / "tokenizer.json", definition)


def held_out_text(split: str = "validation") -> corpora.Corpus:
    """The sources that the first models are not trained on, or the others."""
    name = str(data() / "text.jsonl")
    (found,) = corpora.load(name, split, directory="", validation_fraction=GENERAL)
    return found


def first(seed: str) -> Path:
    """The model that all methods begin with."""
    if command.MODEL.value:
        return Path(command.MODEL.value)
    return train("configs/small.py", f"first_{seed}", seed, FIRST)


def chats(seed: str) -> Path:
    """The file of the chats that all methods are trained on with a seed."""
    kind = _TABLE.value.removeprefix("finetuning_")
    path = data() / f"{kind}_{seed}.jsonl"
    if not path.exists():
        lines = (data() / "train.jsonl").read_text("utf-8").splitlines()
        chosen = random.Random(f"chats {seed}").sample(lines, min(CHATS, len(lines)))
        found = [json.loads(line) for line in chosen]
        share = SHARE if kind == "corrupted" else 0.0
        docstring_chats.write_lines(path, docstring_chats.corrupt(found, share, int(seed)))
    return path


def tune(method: str, seed: str) -> Path:
    """The work directory of a method, after the run of its reference."""
    corpus = chats(seed)
    keys = KEYS | {"data.corpus": corpus, "objective.weighting": method} | OWN.get(method, {})
    begin = first(seed)
    config, places = f"configs/finetune.py:{begin}", {"first": begin}
    if method == "rho1":
        own = KEYS | REFERENCE
        places["reference"] = train(config, f"reference_{seed}", seed, own, FURTHER)
    return train(
        config, f"{corpus.stem.removesuffix(seed)}{method}_{seed}", seed, keys, FURTHER, **places
    )


def train(
    config: str,
    name: str,
    seed: str,
    keys: dict[str, Any],
    further: list[str] | tuple[()] = (),
    **places: Path,
) -> Path:
    """The work directory of a run that has ended; {NAME} in a value of a key is a place."""
    folder = Path(_RUNS.value) / name
    if not (folder / "curves.png").exists():
        arguments = [
            f"--config.{key}={str(value).format(data=data(), **places)}"
            for key, value in keys.items()
        ]
        program = [sys.executable, "-m", "launch.train", f"--config={config}"]
        program += [f"--workdir={folder}", f"--config.train.seed={seed}", *arguments, *further]
        if code := subprocess.run(program).returncode:
            sys.exit(code)  # The run has said why.
    return folder


def measured(place: Path) -> dict[str, Any]:
    """A line of kind "measured" of a model, kept in a file beside it."""
    kept = Path(_RUNS.value) / f"{place.name}.measured.json"
    if not kept.exists():
        command.write_text(kept, strict_json.dumps(measure(place)) + "\n")
    return json.loads(kept.read_text("utf-8"))


def measure(place: Path) -> dict[str, Any]:
    """Losses in bits a byte, and the share of tokens of the held-out answers ranked first."""
    import jax

    from launch import workdir

    loaded = workdir.load_any(str(place))
    with jax.set_mesh(loaded.run.mesh):
        answers = evaluate(loaded, corpora.read(str(data() / "held_out.jsonl")), ranked_first)
        general = evaluate(loaded, held_out_text())
    jax.clear_caches()
    return {
        "step": loaded.step,
        "kind": "measured",
        "answers": answers.bits_per_byte,
        "answers_nats": answers.loss,
        "right": answers.terms["right"],
        "general": general.bits_per_byte,
    }


def evaluate(loaded: Any, corpus: corpora.Corpus, terms: Any = None) -> Any:
    """The evaluation of a model on all of a corpus, in rows of the same length for all models.

    Args:
      loaded: a run.
      corpus: chats or text.
      terms: makes of the model (trained, batch) -> sums and denominators by name.
    """
    from lm.evaluation import perplexity
    from lm.training import experiment

    config, run = loaded.config.copy_and_resolve_references(), loaded.run
    config.data.update(packing="best_fit", sequence_length=KEYS["data.sequence_length"])
    config.train.update(batch_size=KEYS["train.batch_size"], accumulation=1)
    trained, _ = run.usable(loaded.state)
    return perplexity.evaluate(
        run.eval_step(),
        trained,
        experiment.evaluation_batches(config, (corpus,), loaded.tokenizer),
        run.mesh,
        terms=functools.partial(terms(run.model), trained) if terms else None,
    )


def ranked_first(model: Any) -> Any:
    """(trained, batch) -> how many targets the model ranks first, and how many there are."""
    import jax
    import jax.numpy as jnp

    from lm.training.forward import make_forward

    forward = make_forward(model)

    @jax.jit
    def count(trained, batch):
        outputs, head_DV = forward(trained, batch)
        first_BT = jnp.argmax(outputs.hidden @ head_DV, axis=-1)
        weights_BT = batch["weights"]
        right = jnp.sum(weights_BT * (first_BT == batch["targets"]))
        return {"right": (right, jnp.sum(weights_BT))}

    return count


if __name__ == "__main__":
    sys.argv = [one for one in sys.argv if one not in FURTHER]
    command.run(main)
