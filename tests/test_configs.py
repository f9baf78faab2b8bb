"""Every config can be built, does what it says, and runs after the commands of its docstring."""

import ast
import importlib
import json
import math
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest
import tiny
from absl import flags
from ml_collections.config_flags import config_flags

from lm.data.documents import Corpus
from lm.training import experiment, loop, make_objective
from objectives.losses import LOSSES
from objectives.policy import POLICY
from objectives.preference import PREFERENCE
from objectives.weighting import WEIGHTINGS

ROOT = Path(__file__).parent.parent
METHODS = [
    str(path.relative_to(ROOT))
    for folder in ("weightings", "losses", "preference", "distillation", "policy")
    for path in sorted((ROOT / "configs" / folder).glob("*.py"))
    if path.stem != "__init__"
]
OTHERS = [f"configs/{name}.py" for name in ("base", "quickstart", "answers", "sums")] + [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "configs" / "papers").glob("*.py"))
    if path.stem != "__init__"
]
SCALE = [f"configs/scale/{size}.py" for size in ("125m", "350m", "1b3", "7b", "70b")]
# Of the configs -> of their toys.
STEPS = {110: 2, 200: 2, 600: 3, 620: 4, 1800: 3}
# A run whose references are where the config looks for them has these commands before it.
MAKERS = re.compile(r"--(?:workdir|output)=(\S+)")


def docstring(name):
    return ast.get_docstring(ast.parse((ROOT / name).read_text()))


def commands(name):
    """The commands of a docstring, each a list of a command's name and its arguments."""
    joined = re.sub(r"\n +(?=--)", " ", docstring(name))
    found = re.findall(r"python -m launch\.(\w+) (.*)", joined)
    # [--optional=argument] of a command that is a form to be filled in.
    return [
        [command, *shlex.split(arguments.translate({91: "", 93: ""}))]
        for command, arguments in found
    ]


def arguments_of(name):
    """NAME, or NAME:ARGUMENT for each argument that the docstring names."""
    sentence = re.search(r"The argument is ([^.]*)", docstring(name))
    given = re.findall(r"`(\w+)`", sentence[1]) if sentence else []
    given += re.findall(rf"--config={name}:([\w/]+)", docstring(name))
    return [f"{name}:{argument}" for argument in dict.fromkeys(given)] or [name]


def load(arguments):
    """The config that --config=FILE and its overrides make; unknown keys and types are errors."""
    mine = [a for a in arguments if a.startswith("--config")]
    mine = [a.replace("--config=configs", f"--config={ROOT}/configs") for a in mine]
    values = flags.FlagValues()
    argv = ["train", *mine]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        values(argv)
    return holder.value


def build(config):
    corpus = Corpus("stub", [None] * 7, "stub", 0)
    config = experiment.resolve(config, [corpus])
    return experiment.build(config, config.data.vocab_size or 257, jax.devices()[:1])


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_a_config_and_the_commands_of_its_docstring_are_sound(name):
    of_train = [arguments for command, *arguments in commands(name) if command == "train"]
    assert any(f"--config={name}" in argument for a in of_train for argument in a)
    for argument in arguments_of(name) if name in METHODS else ():
        build(load([f"--config={argument}"]))
    for command, *arguments in commands(name):
        module = importlib.import_module(f"launch.{command}")
        by_module = flags.FLAGS.flags_by_module_dict()
        known = {f.name for m in ("launch.command", module.__name__) for f in by_module.get(m, ())}
        given = {a.lstrip("-").partition("=")[0] for a in arguments}
        assert {g for g in given if not g.startswith("config.")} <= known
        if "config" in given:
            build(load(arguments))


@pytest.mark.parametrize("name", tiny.mostly_slow(SCALE, SCALE[-1:]))
def test_a_size_and_its_meshes_are_sound_on_all_their_hardware(name):
    topologies = runpy.run_path(str(ROOT / name))["TOPOLOGIES"]
    assert arguments_of(name) == [f"{name}:{hardware}" for hardware in topologies]
    (train,), (planned,) = (
        [arguments for command, *arguments in commands(name) if command == wanted]
        for wanted in ("train", "plan")
    )
    assert train[0] == planned[0] == f"--config={name}:v5p"
    assert planned[1] == f"--topology={topologies['v5p']}"
    sizes = set()
    for hardware, topology in topologies.items():
        config = load([f"--config={name}:{hardware}"])
        chips = [int(size) for size in topology.partition(":")[2].split("x") if size]
        run = experiment.build(config, config.data.vocab_size, math.prod(chips) if chips else 8)
        shapes = run.abstract_state().trained.params
        sizes.add(sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)))
        tokens = config.train.steps * config.train.batch_size * config.data.sequence_length
        assert tokens == pytest.approx(20 * max(sizes), rel=0.01)
    (parameters,) = sizes
    number, unit = re.search(r"(\d+\.?\d*) (m|b)illion parameters", docstring(name)).groups()
    assert parameters == pytest.approx(float(number) * {"m": 1e6, "b": 1e9}[unit], rel=0.02)
    with pytest.raises(LookupError, match="v5e, v5p, h100"):
        runpy.run_path(str(ROOT / name))["get_config"]("v4")


@pytest.mark.parametrize("name", METHODS)
def test_a_docstring_says_what_a_reader_needs(name):
    text = docstring(name)
    for word in ("Command:", "Against:", "Cost:", "Claim:", "arXiv"):
        assert word in text
    assert "not been checked" in text or "UNCONFIRMED" in text or re.search(r"\d%|\d\.\d", text)
    made = set(MAKERS.findall(text))
    references = load([f"--config={name}"]).objective.references.to_dict().values()
    assert {source for source in references if source not in ("", "ema")} <= made


def test_every_method_has_a_config():
    weightings, losses, objectives = set(), set(), set()
    for name in [*METHODS, "configs/quickstart.py"]:
        for argument in arguments_of(name):
            config = load([f"--config={argument}"])
            weightings |= set(make_objective.weighting_names(config))
            losses.add(config.objective.loss)
            objectives.add(config.objective.name)
    assert weightings == set(WEIGHTINGS)
    assert losses == set(LOSSES)
    assert objectives >= set(PREFERENCE) | set(POLICY) - {"policy"}


def shrink(config):
    """The same experiment as a toy of two or three steps, and one more where a run goes on."""
    steps = STEPS[config.train.steps]
    config.model.update(layers=1, width=32, heads=2, kv_heads=2, mlp_width=32, unroll=1)
    if config.data.corpus == "stdlib":
        config.data.update(corpus="text", tokenizer="bytes", vocab_size=0, sequence_length=32)
        config.data.validation_fraction = 0.3
    config.data.shuffle_rows = 8
    if config.rollouts.share:
        config.rollouts.update(tokens=8, prompt_tokens=8)
    config.train.update(steps=steps, batch_size=8, log_every=1, tensorboard=False)
    config.optimizer.warmup_steps = 1
    config.evaluation.update(every_steps=0, batches=1, sample_tokens=0, ngram_order=0)
    config.evaluation.problems = min(config.evaluation.problems, 8)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where commands are run: with the data of configs/answers.py, and some text."""
    path = tmp_path_factory.mktemp("repository")
    tiny.write_corpus(path / "text")
    script = re.search(r"^mkdir.*?^\"$", docstring("configs/answers.py"), re.DOTALL | re.MULTILINE)
    script = script[0].replace("python -c", f"{sys.executable} -c").replace("5000", "500")
    subprocess.run(["bash", "-c", script], cwd=path, check=True)
    return path


def run(folder, command, arguments):
    if command == "train":
        (workdir,) = (a.removeprefix("--workdir=") for a in arguments if "--workdir=" in a)
        config = shrink(load(arguments))
        result = loop.train(config, workdir, lambda line: None)
        assert result.step == config.train.steps
        last = [json.loads(x) for x in Path(workdir, "metrics.jsonl").read_text().splitlines()]
        last = [line for line in last if line["kind"] == "train"][-1]
        assert math.isfinite(last["loss"])
        assert last["skipped_steps"] == 0
        return
    environment = tiny.one_device(PYTHONPATH=ROOT)
    arguments = [a.replace("--step=600", f"--step={STEPS[600]}") for a in arguments]
    if any(a.startswith("--config=") for a in arguments):  # Scores at the positions of a student.
        arguments = [a.replace("--config=configs", f"--config={ROOT}/configs") for a in arguments]
        toy = {"corpus": "text", "tokenizer": "bytes", "vocab_size": 0, "validation_fraction": 0.3}
        arguments += [f"--config.data.{key}={value}" for key, value in toy.items()]
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{command}", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# What a line of kind `train` of every policy gradient has, and of some.
REPORTED = {
    "policy": "reward reward_std solved groups_without_signal response_length ended advantage "
    "no_signal entropy clip_low clip_high ratio_max ratio_min kl_behaviour_k1 kl_behaviour_k3 "
    "positive_high positive_low negative_high negative_low grad_norm weight_sum loss",
    "ppo": "value_loss",
}
# One of each kind: the others differ in a ratio or an advantage alone, which their own tests hold.
POLICIES = ("balanced", "d3s", "dapo", "hapo", "icepop", "ppo", "quantized_rollouts", "tw_grpo")


@pytest.mark.parametrize("name", tiny.mostly_slow(POLICIES, quick=("hapo",)))
def test_a_policy_gradient_reports_what_it_does(name, tmp_path):
    """Two steps of its config from a fresh model, with a reward that some answers get."""
    config = shrink(load([f"--config=configs/policy/{name}.py"]))
    config.initialise["from"] = ""
    config.train.steps = 2
    config.rollouts.rewards = "format"
    config.rollouts.format.pattern = "(?s).*[a-z].*"
    assert loop.train(config, str(tmp_path), lambda line: None).finished
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if line["kind"] == "train")
    wanted = f"{REPORTED['policy']} {REPORTED.get(name, '')}".split()
    if config.rollouts.reuse > 1:
        wanted.append("rollout_age")
    for line in (first, second):
        assert {key: line[key] for key in wanted if not math.isfinite(line[key])} == {}
        assert line["skipped_steps"] == 0
        assert 0 < line["reward"] < 1
    assert first["grad_norm"] > 0
    # A step of a toy is so long that narrow bounds clip all that comes after it.
    assert second["grad_norm"] > 0 or second["clip_low"] + second["clip_high"] > 0
    # Drawn with other weights than those that are trained, or after a step on what was drawn.
    rounded = config.rollouts.bits < 16
    assert (abs(first["kl_behaviour_k3"]) > 1e-4) == rounded
    assert (abs(second["kl_behaviour_k3"]) > 1e-6) == (rounded or config.rollouts.reuse > 1)


# One of each kind of commands: with a reference, two of them, scores, a teacher, faulty answers,
# answers that are drawn.
RUN = (
    "weightings/fait",
    "weightings/rho1",
    "losses/harmonic",
    "preference/dpo",
    "preference/treg",
    "distillation/alm",
    "distillation/top_k",
    "policy/grpo",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"configs/{name}.py" for name in RUN])
def test_the_commands_of_a_docstring_run_after_each_other(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if "the data of configs/answers.py" not in docstring(name):
        assert not re.search(r"configs/answers|runs/(right|noisy)", docstring(name))
    for command, *arguments in commands(name):
        # What another docstring has made is there.
        made = [a.partition("=")[2] for a in arguments if a.startswith(("--workdir=", "--output="))]
        goes_on = f"--config={name}" in arguments
        if command == "evaluate" or goes_on or not all(Path(one).exists() for one in made):
            run(folder, command, arguments)
    for argument in arguments_of(name):
        given = any(f"--config={argument}" in a for _, *a in commands(name))
        if not given and argument != f"{name}:{Path(name).stem}":
            stem = argument.replace(":", "_").replace("/", "_")
            run(folder, "train", [f"--config={argument}", f"--workdir=runs/{stem}"])
