"""evaluation.tasks: figures of tasks in the lines of kind validation."""

import json
from pathlib import Path

import jax
import pytest
import tiny
from short_runs import lines, train

from launch import workdir
from lm.errors import InputError
from lm.evaluation.tasks.evaluate import evaluate
from lm.evaluation.tasks.model import Programs, encoder_of
from lm.evaluation.tasks.task import read_task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of pairs of words of the corpus."""
    folder = tmp_path_factory.mktemp("task")
    items = [{"good": "alpha beta", "bad": "zq"}, {"good": "beta", "bad": "return ="}]
    (folder / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    path = folder / "words.yaml"
    path.write_text(
        "task: words\ndataset_path: json\ndataset_kwargs: {data_files: items.jsonl}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: ''\n"
        "doc_to_choice: '{{[good, bad]}}'\ndoc_to_target: 0\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


def config(corpus, task, **overrides):
    steps = {"train__steps": 4, "evaluation__every_steps": 2}
    c = tiny.config(data__corpus=corpus, evaluation__tasks=task, **steps, **overrides)
    c.model.layers = 1
    return c


def test_each_evaluation_has_the_figures_of_the_command(corpus, task, tmp_path):
    c = config(corpus, task)
    _, said = train(c, tmp_path)
    found = lines(tmp_path, "validation")
    assert [line["step"] for line in found] == [2, 4]
    assert all(0 <= line["words/acc"] <= 1 for line in found)
    assert any(f"words/acc {found[-1]['words/acc']:.4f}" in line for line in said)
    loaded = workdir.load(str(tmp_path))
    encoder = encoder_of(loaded.run, loaded.tokenizer, trained_here=True)
    assert encoder.about() == {"beginning": "always", "length": 32}
    with jax.set_mesh(loaded.run.mesh):
        trained, quantized = loaded.run.stored(loaded.state)
        machine = Programs(loaded.run, quantized, encoder).machine(trained)
        outcome = evaluate(read_task(task), machine)
    assert {f"words/{one.metric}": one.value for one in outcome.figures} == {
        name: value for name, value in found[-1].items() if name.startswith("words/")
    }


@pytest.mark.slow
def test_without_tasks_a_run_has_the_same_losses_and_no_figures(corpus, task, tmp_path):
    train(config(corpus, task), tmp_path / "with")
    train(config(corpus, ""), tmp_path / "without")
    for one, other in zip(
        *(lines(tmp_path / name, "validation") for name in ("with", "without")), strict=True
    ):
        assert not any("/" in name for name in other)
        assert one == other | {name: x for name, x in one.items() if "/" in name}


@pytest.mark.slow
def test_a_quantized_run_is_asked_on_its_grids(corpus, task, tmp_path):
    train(config(corpus, task, quantization__bits=4.0, quantization__fraction="1.0"), tmp_path)
    (last,) = [line for line in lines(tmp_path, "validation") if line["whole"]]
    packed = workdir.load_packed(str(tmp_path / "packed.safetensors"))
    encoder = encoder_of(packed.run, packed.tokenizer, trained_here=True)
    with jax.set_mesh(packed.run.mesh):
        trained, quantized = packed.run.stored(packed.state)
        outcome = evaluate(
            read_task(task), Programs(packed.run, quantized, encoder).machine(trained)
        )
    assert outcome.figures[0].value == last["words/acc"]


def test_a_file_that_is_no_task_is_refused_before_anything_is_written(corpus, tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        train(config(corpus, "none.yaml"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_answer_that_does_not_fit_is_refused_before_anything_is_written(corpus, task, tmp_path):
    path = tmp_path / "written.yaml"
    written = Path(task).read_text().replace("multiple_choice", "generate_until")
    path.write_text(written.replace("items.jsonl", f"{Path(task).parent}/items.jsonl"))
    with pytest.raises(InputError, match="max_gen_toks=256 leaves no room for a prompt in the 32"):
        train(config(corpus, str(path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
