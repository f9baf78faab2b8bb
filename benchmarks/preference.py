r"""Preference objectives on a pretrained model: held-out pairs, with intervals over seeds.

python benchmarks/preference.py --source=SOURCE --pairs=pairs.jsonl --runs=runs/preference \
    [--objectives=dpo,tgdpo,sparse_po] [--seeds=0,1,2] [--collect=docs/results]

Adapters of rank 8 are trained for 100 steps of two pairs; what is compared with is the model below
them, and a third of the pairs is held out. benchmarks/spelling_pairs.py makes pairs. Every run is a
command of launch.train with a folder of its own, and one that has ended is not run again. `tgdpo`
takes the rewards of tokens from the run of `dpo` with the same seed.

Prints the table `preference` of launch.benchmark_tables: mean over the seeds and 95% interval
(Student's t) of the last validation, on all held-out pairs. KL(base, model) a token of the answers
is measured after training, for every run in the same way. --collect writes the table to a folder,
with the metrics of all runs beside it, from which `python -m launch.results --trace` makes it
again.
"""

import subprocess
import sys
from pathlib import Path

import jax
from absl import flags

from launch import benchmark_tables, command, workdir
from lm.evaluation import perplexity
from lm.training import experiment, make_objective
from lm.training.logging import read_metrics
from lm.training.term_evaluation import TermEvaluation

_SOURCE = flags.DEFINE_string("source", None, "The pretrained model.", required=True)
_PAIRS = flags.DEFINE_string("pairs", None, "JSON lines of pairs.", required=True)
_RUNS = flags.DEFINE_string("runs", "runs/preference", "Folder of the work directories.")
_OBJECTIVES = flags.DEFINE_list("objectives", ["dpo", "tgdpo", "sparse_po"], "What is compared.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the order of data and adapters.")
_COLLECT = flags.DEFINE_string("collect", None, "Folder to write the table and its runs to.")

STEPS = 100
KEYS = {
    "data.packing": "best_fit",
    "data.validation_fraction": 0.33,
    "data.sequence_length": 128,
    "train.batch_size": 2,
    "train.steps": STEPS,
    "model.adapter_rank": 8,
    "optimizer.peak_learning_rate": 1e-4,
    "objective.references.reference_nll": "base",
    "evaluation.every_steps": 0,
    "evaluation.sample_tokens": 0,
}
OWN = {
    "tgdpo": {"objective.references.reward_nll": "{runs}/dpo_{seed}"},
    "sparse_po": {
        "objective.references.teacher": "base",
        "objective.sparse_po.mask": "activations",
    },
}


def main() -> None:
    """Trains what is missing, and prints the table."""
    command.use_compilation_cache()
    runs = {}
    for name in _OBJECTIVES.value:
        for seed in _SEEDS.value:
            folder = train(name, seed)
            measured = {"step": STEPS, "kind": "measured", "reference_kl": divergence(folder)}
            runs[name, int(seed)] = [*read_metrics(folder), measured]
    head, *rows = benchmark_tables.preference(runs)
    print("\n".join(command.table(head, rows)))
    if _COLLECT.value:
        written = benchmark_tables.collect("preference", runs, Path(_COLLECT.value))
        print(f"written: {written}")


def train(name: str, seed: str) -> Path:
    """The work directory of a run that has ended."""
    folder = Path(_RUNS.value) / f"{name}_{seed}"
    keys = KEYS | OWN.get(name, {})
    keys |= {"objective.name": name, "train.seed": seed, "data.corpus": _PAIRS.value}
    arguments = [
        f"--config.{key}={str(value).format(runs=_RUNS.value, seed=seed)}"
        for key, value in keys.items()
    ]
    if not (folder / "metrics.jsonl").exists() or last_validation(folder) is None:
        config = f"--config=configs/finetune.py:{_SOURCE.value}"
        program = [sys.executable, "-m", "launch.train", config, f"--workdir={folder}"]
        subprocess.run([*program, *arguments], check=True)
    return folder


def last_validation(folder: Path) -> dict[str, float] | None:
    """The line of the whole held-out split at the end."""
    lines = [one for one in read_metrics(folder) if one["kind"] == "validation"]
    return next((one for one in lines if one["step"] == STEPS and one["whole"]), None)


def divergence(folder: Path) -> float:
    """KL(base, model), nats a token of the held-out answers; the base is below the adapters."""
    loaded = workdir.load(str(folder))
    config = loaded.config.copy_and_resolve_references()
    config.objective.name = "sparse_po"
    config.objective.sparse_po.mask = "ones"
    config.objective.references.teacher = "base"
    objective = make_objective.make_objective(config)
    run = loaded.run._replace(config=config, objective=objective)
    texts = experiment.load_data(config.data).validation
    with jax.set_mesh(run.mesh):
        state = loaded.state._replace(objective=objective.init())
        measured = perplexity.evaluate(
            run.eval_step(),
            run.usable(state)[0],
            experiment.evaluation_batches(config, texts, loaded.tokenizer),
            run.mesh,
            terms=TermEvaluation(run, {}, {})(state),
        )
    return measured.terms["reference_kl"]


if __name__ == "__main__":
    command.run(main)
