import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from short_runs import final_state, lines, train

from lm.errors import InputError
from lm.runs.checkpoints import Checkpoints
from lm.training import experiment, loop
from lm.training.logging import read_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The config of a short run, its work directory, which tests copy, and its result."""
    config = tiny.config(data__corpus=corpus, train__steps=3, optimizer__warmup_steps=1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    result, _ = train(config, folder)
    return config, folder, result


def test_checkpoints_of_given_steps_are_saved_and_stay(corpus, tmp_path):
    config = tiny.config(data__corpus=corpus, checkpoint__every_steps=3, checkpoint__keep=1)
    config.checkpoint.update(keep_best=0, at_steps=(2, 4))
    train(config, tmp_path)
    kept = Checkpoints(epath.Path(tmp_path) / "checkpoints", print, read_only=True)
    assert kept.steps() == [2, 4, 6]  # and not 3, which another one has replaced
    kept.close()


def test_a_stopped_run_goes_on_as_if_it_had_not(corpus, tmp_path):
    """SIGTERM saves and a second start continues: state, data order and metrics, bit for bit."""
    config = tiny.config(
        data__corpus=corpus, train__ema_decay=0.9, evaluation__every_steps=2, train__accumulation=1
    )
    whole, said = train(config, tmp_path / "whole")
    assert whole.finished
    assert whole.step == 6
    stopped, _ = train(config, tmp_path / "cut", stop_after=2)
    assert not stopped.finished
    assert 2 <= stopped.step < 6
    resumed, said = train(config, tmp_path / "cut")
    assert resumed.finished
    assert f"resumed at step {stopped.step}" in said
    for kind in ("train", "validation"):
        assert lines(tmp_path / "cut", kind) == lines(tmp_path / "whole", kind)
    assert len(lines(tmp_path / "cut", "train")) == 6
    (a, at), (b, bt) = (final_state(config, tmp_path / name) for name in ("cut", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert at == bt


@pytest.mark.slow
def test_what_a_weighting_carries_goes_on_as_well(corpus, tmp_path):
    """GLOW's table and a history, stopped in the middle of an epoch."""
    weighting = {
        "objective__weighting": "ss_token*glow",
        "objective__ss_token__gamma": 1.0,
        "objective__references__history_nll": "ema",
        "train__ema_decay": 0.8,
    }
    config = tiny.config(
        data__corpus=corpus,
        data__packing="best_fit",
        model__layers=1,
        train__batch_size=32,
        train__steps=16,
        checkpoint__every_steps=0,
        optimizer__peak_learning_rate=0.02,
        **weighting,
    )
    train(config, tmp_path / "whole")
    stopped, _ = train(config, tmp_path / "cut", stop_after=10)
    assert 10 <= stopped.step < 16
    resumed, _ = train(config, tmp_path / "cut")
    assert resumed.finished
    assert lines(tmp_path / "cut", "train") == lines(tmp_path / "whole", "train")
    documents = len(experiment.load_data(config.data).train[0].documents)
    record = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert record["config"]["objective"]["glow"]["samples"] == documents
    config.objective.glow.samples = documents
    (a, at), (b, bt) = (final_state(config, tmp_path / run) for run in ("cut", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert at == bt
    (table,) = jax.tree.leaves(a.objective)
    assert table.shape == (documents,)
    assert (table >= 0).mean() > 0.5
    seen = [line["glow_seen"] for line in lines(tmp_path / "cut", "train")]
    assert seen[0] == 0
    assert seen[-1] > 0  # Negative control: the table matters after the stop.
    assert len({line["glow_mean_weight"] for line in lines(tmp_path / "cut", "train")}) > 1


@pytest.mark.slow
def test_a_run_on_other_data_differs(corpus, tmp_path):
    """Negative control of the test above: a lost data position would show in the losses."""
    one = tiny.config(data__corpus=corpus, train__steps=3, optimizer__warmup_steps=1)
    other = tiny.config(
        data__corpus=corpus, train__steps=3, optimizer__warmup_steps=1, train__seed=1
    )
    train(one, tmp_path / "a")
    train(other, tmp_path / "b")
    assert lines(tmp_path / "a", "train") != lines(tmp_path / "b", "train")


def test_a_finished_run_is_left_as_it_is(finished, tmp_path):
    config, folder, first = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = lines(tmp_path, "train"), lines(tmp_path, "validation")
    again, _ = train(config, tmp_path)
    assert again.validation == first.validation
    assert before == (lines(tmp_path, "train"), lines(tmp_path, "validation"))


def test_what_a_work_directory_holds(corpus, tmp_path):
    config = tiny.config(
        data__corpus=corpus,
        train__tensorboard=True,
        evaluation__sample_tokens=5,
        evaluation__ngram_order=2,
    )
    result, said = train(config, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["model"]["width"] == 32
    assert record["versions"]["jax"] == jax.__version__
    line = lines(tmp_path, "train")[-1]
    assert line["step"] == 6
    expected = {"loss", "weight_sum", "grad_norm", "learning_rate", "skipped_steps", "tokens"}
    assert expected <= set(line)
    assert "tokens_per_second" in read_metrics(epath.Path(tmp_path))[-3]
    (validation,) = lines(tmp_path, "validation")
    np.testing.assert_allclose(
        validation["bits_per_byte"], result.validation.bits_per_byte, rtol=1e-12
    )
    assert result.baseline > 0
    assert list(tmp_path.glob("events.out.tfevents*"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "samples" / "step_6.txt").read_text().startswith("def ")
    assert result.checkpoint.exists()
    assert any("parameters" in text for text in said)


@pytest.mark.slow
def test_keeps_the_newest_and_the_best(corpus, tmp_path):
    config = tiny.config(
        data__corpus=corpus,
        checkpoint__every_steps=1,
        checkpoint__keep=2,
        evaluation__every_steps=1,
        optimizer__peak_learning_rate=1.0,  # far too high: the first evaluation stays the best
        train__steps=5,
    )
    train(config, tmp_path)
    losses = {line["step"]: line["loss"] for line in lines(tmp_path, "validation")}
    best = min(losses, key=losses.get)
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert kept == {4, 5, best}


@pytest.mark.slow
def test_saves_every_few_minutes(corpus, tmp_path):
    options = {"checkpoint__every_steps": 0, "checkpoint__keep": 9, "train__steps": 3}
    for minutes, expected in ((1e-9, {1, 2, 3}), (60.0, {3})):
        config = tiny.config(data__corpus=corpus, checkpoint__every_minutes=minutes, **options)
        train(config, tmp_path / str(minutes))
        saved = (tmp_path / str(minutes) / "checkpoints").iterdir()
        assert {int(p.name) for p in saved} == expected


def test_passes_over_what_was_cut_short_or_damaged(corpus, tmp_path):
    config = tiny.config(data__corpus=corpus, checkpoint__keep=3, checkpoint__every_steps=2)
    train(config, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "8.orbax-checkpoint-tmp-1").mkdir()
    for path in (folder / "6" / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    result, said = train(config, tmp_path)
    assert result.step == 6
    assert any("8.orbax-checkpoint-tmp-1" in line and "cut short" in line for line in said)
    assert any("passed over checkpoint 6" in line for line in said)
    assert "resumed at step 4" in said
    assert any(p.name.startswith("unreadable_6") for p in folder.iterdir())
    assert [line["step"] for line in lines(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


def test_stops_rather_than_start_anew_when_no_checkpoint_can_be_read(finished, tmp_path):
    config, folder, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / "3" / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="can be read"):
        train(config, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_batches_without_targets_and_unknown_samples_end_a_run(corpus, tmp_path):
    """Skipped one by one with a line each, and never a loss of 0 that looks like success."""
    prompts = tmp_path / "prompts.jsonl"
    one = {"prompt": "x" * 30_000, "response": "y"}
    prompts.write_text(
        "\n".join(json.dumps(one | {"prompt": one["prompt"] + str(i)}) for i in range(20))
    )
    masked = {"data__corpus": str(prompts), "train__max_skips": 3}
    unknown = {
        "data__corpus": corpus,
        "objective__weighting": "glow",
        "objective__glow__samples": 1,
        "train__max_skips": 3,
    }
    for name, change, shown in (("masked", masked, "weight 0"), ("unknown", unknown, "loss nan")):
        said = []
        with pytest.raises(loop.Diverged, match="3 steps in a row"):
            loop.train(tiny.config(model__layers=1, **change), str(tmp_path / name), said.append)
        assert (
            sum(f"skipped step {i}: " in line and shown in line for i in (1, 2, 3) for line in said)
            == 3
        )


@pytest.mark.slow
def test_a_run_goes_on_with_another_loss_of_the_same_head(corpus, tmp_path):
    """A trained run may forget; a loss with a head of its own needs a run of its own."""
    config = tiny.config(
        data__corpus=corpus, train__steps=3, optimizer__warmup_steps=1, model__layers=1
    )
    train(config, tmp_path)
    config.train.steps = 6
    config.objective.loss = "harmonic"
    with pytest.raises(InputError, match=r"with objective\.loss=cross_entropy, not harmonic"):
        train(config, tmp_path)
    config.objective.loss = "inverted_hinge"
    _, said = train(config, tmp_path)
    assert "resumed at step 3" in said
    assert sum(line.startswith("changed: train.steps 3 -> 6; ") for line in said) == 1
    # What is minimised is no longer the negative log-likelihood.
    assert ["nll" in line for line in lines(tmp_path, "train")] == [False] * 3 + [True] * 3
    assert all(line["loss"] <= 2 < line["nll"] for line in lines(tmp_path, "train")[3:])


def test_gives_up_after_too_many_skipped_steps(corpus, tmp_path):
    config = tiny.config(
        data__corpus=corpus,
        train__max_skips=2,
        train__steps=20,
        optimizer__peak_learning_rate=1e30,
        optimizer__warmup_steps=0,
        checkpoint__every_steps=0,
    )
    with pytest.raises(loop.Diverged, match="2 steps in a row"):
        train(config, tmp_path)
    skipped = [line["step"] for line in lines(tmp_path, "event")]
    assert len(skipped) == 2


@pytest.mark.parametrize(
    ("change", "names"),
    tiny.rows_mostly_slow(
        [
            ({"model__width": 64}, "model.width=32, not 64"),
            ({"train__seed": 3}, "train.seed=0, not 3"),
            ({"train__trainable": "mlp"}, "train.trainable=, not mlp"),
            ({"data__tokenizer": "bpe", "data__vocab_size": 260}, "data.tokenizer"),
        ],
        (0,),
    ),
    ids=str,
)
def test_refuses_a_work_directory_of_another_config(corpus, finished, tmp_path, change, names):
    short = {"data__corpus": corpus, "train__steps": 3, "optimizer__warmup_steps": 1}
    shutil.copytree(finished[1], tmp_path, dirs_exist_ok=True)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=names):
        train(tiny.config(**short, **change), tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    train(tiny.config(**short, model__remat="full"), tmp_path)


@pytest.mark.slow
def test_refuses_a_weighting_that_carries_something_else(corpus, tmp_path):
    short = {"data__corpus": corpus, "train__steps": 1, "optimizer__warmup_steps": 0}
    glow = short | {"objective__weighting": "glow"}
    train(tiny.config(**glow), tmp_path)
    with pytest.raises(InputError, match=r"objective\.weighting=glow, not dft: give the same"):
        train(tiny.config(**short, objective__weighting="dft"), tmp_path)
    with pytest.raises(InputError, match=r"objective\.glow\.samples=\d+, not 99: give the same"):
        train(tiny.config(**glow, objective__glow__samples=99), tmp_path)
    (tmp_path / "plain").mkdir()
    train(tiny.config(**short), tmp_path / "plain")
    with pytest.raises(InputError, match=r"objective\.weighting=uniform, not glow"):
        train(tiny.config(**glow), tmp_path / "plain")
    # One that carries nothing can take the place of another.
    train(tiny.config(**short, objective__weighting="dft"), tmp_path / "plain")


def test_model_flops_are_those_of_the_formula():
    """6 N + 12 L T D of the four-layer byte model: 6.49 MFLOP a token."""
    config = tiny.config(
        model__layers=4,
        model__width=128,
        model__mlp_width=512,
        model__kv_heads=4,
        data__sequence_length=256,
        train__batch_size=16,
    )
    assert experiment.build(config, 256).flops_per_token() == 6 * (4 * 12 + 2) * 128**2 + (
        12 * 4 * 256 * 128
    )
