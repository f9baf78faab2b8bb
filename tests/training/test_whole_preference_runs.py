"""Runs on preference data from the first step to the last: validation, kills, the commands."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import short_runs
from test_preference_runs import LENGTH, batch, built, config, corpus, steps

from lm.data.layout import encode_document
from lm.data.tokenizers import Bytes
from lm.evaluation import perplexity
from lm.model.adapters import merged_config, without
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.references.scoring import score_documents
from lm.training import experiment
from lm.training.forward import make_prediction_statistics
from lm.training.make_objective import preference_reading
from lm.training.term_evaluation import term_evaluation


@pytest.fixture(scope="module")
def evaluated():
    """(run, state after some steps, evaluation of the corpus over several batches, batches)."""
    run = built("dpo", train__batch_size=1)
    _, state = steps(built("dpo"), batch("dpo"))
    batches = list(experiment.evaluation_batches(run.config, (corpus(),), Bytes()))
    assert len(batches) > 2
    reading = preference_reading(run.config, run.objective)
    with jax.set_mesh(run.mesh):
        terms = term_evaluation(run, reading, (), {}, {}, print)
        found = perplexity.evaluate(
            run.eval_step(), state.trained, batches, run.mesh, terms=terms(state)
        )
    return run, state, found, batches


def test_validation_has_every_term_of_all_pairs(evaluated):
    run, state, found, _ = evaluated
    texts, base = (corpus(),), Trained(without(state.trained.params))
    plain = make_model(merged_config(run.model.config))

    def losses(model, trained):
        nll = jax.jit(lambda rows: make_prediction_statistics(model, 64)(trained, rows).nll)
        return score_documents(nll, texts, Bytes(), batch_size=4, sequence_length=LENGTH)

    rewards, chosen_nll, chosen_count = [], 0.0, 0
    for document, own, reference in zip(
        texts[0].documents, losses(run.model, state.trained), losses(plain, base), strict=True
    ):
        weights = [encode_document(a, Bytes())["weights"] for a in document.answers]
        ratio = np.float64(reference) - np.float64(own)
        size = len(weights[0])
        rewards.append([0.1 * ratio[:size] @ weights[0], 0.1 * ratio[size:] @ weights[1]])
        chosen_nll += np.float64(own[:size]) @ weights[0]
        chosen_count += weights[0].sum()
    chosen, rejected = np.transpose(rewards)
    margin = chosen - rejected
    assert found.terms["accuracy"] == pytest.approx(np.mean(margin > 0))
    assert found.terms["margin"] == pytest.approx(margin.mean(), abs=1e-5)
    assert found.terms["reward_chosen"] == pytest.approx(chosen.mean(), abs=1e-5)
    assert found.terms["objective_loss"] == pytest.approx(
        np.log1p(np.exp(-margin)).mean(), abs=1e-5
    )
    assert np.ptp(margin) > 1e-3
    # The validation loss is that of the chosen answers, as an ordinary objective has it.
    assert found.loss == pytest.approx(chosen_nll / chosen_count, rel=1e-5)
    assert found.weight_sum == chosen_count
    assert {"accuracy", "margin", "loss", "objective_loss"} <= found.figures().keys()


def write(folder, labelled=False):
    folder.mkdir(exist_ok=True)
    lines = []
    for i, document in enumerate(corpus(180).documents):
        prompt, chosen, rejected = (
            document.spans[0][0],
            document.spans[1][0],
            document.rejected.spans[1][0],
        )
        if labelled:
            lines.append(
                {"prompt": prompt, "completion": (rejected, chosen)[i % 2], "label": bool(i % 2)}
            )
        else:
            lines.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


PHASES = {
    "quantization__bits": 4.0,
    "quantization__fraction": "0.5",
    "quantization__fused_cooldown": False,
    "quantization__warmup_steps": 1,
    "train__batch_size": 16,
    "train__accumulation": 2,
    "evaluation__every_steps": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "bco", "kto"])
def test_a_run_that_is_killed_goes_on_exactly_into_its_quantized_phase(name, tmp_path):
    c = config(name, data__corpus=write(tmp_path / "data", name == "kto"), **PHASES)
    _, said = short_runs.train(c, tmp_path / "whole")
    short_runs.train(c, tmp_path / "parts", stop_after=2)
    result, _ = short_runs.train(c, tmp_path / "parts")
    assert result.finished
    for kind in ("train", "validation"):
        whole = short_runs.lines(tmp_path / "whole", kind)
        assert whole == short_runs.lines(tmp_path / "parts", kind)
        assert {"accuracy" if name == "dpo" else "reward_chosen"} <= whole[-1].keys()
    assert 0 < short_runs.lines(tmp_path / "whole", "train")[0]["padding"] < 0.9
    (one, position), (other, place) = (
        short_runs.final_state(c, tmp_path / folder) for folder in ("whole", "parts")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert position == place
    assert not any("left out" in line for line in said)


@pytest.mark.slow
def test_commands_on_pairs(tmp_path):
    c = config(data__corpus=write(tmp_path / "data"))
    short_runs.train(c, tmp_path / "run")

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = command("launch.evaluate", f"--model={tmp_path / 'run'}")
    last = short_runs.lines(tmp_path / "run", "validation")[-1]
    assert f"accuracy: {last['accuracy']:.4f}\n" in printed
    assert f"objective_loss: {last['objective_loss']:.4f}\n" in printed
    text = tmp_path / "plain.jsonl"
    text.write_text('{"text": "some text"}\n' * 9 + '{"text": "other text"}\n' * 9)
    other = command(
        "launch.evaluate", f"--model={tmp_path / 'run'}", f"--corpus={text}", "--split=train"
    )
    assert "accuracy" not in other
    command("launch.score", f"--model={tmp_path / 'run'}", f"--output={tmp_path / 's'}")
    scored = config(
        data__corpus=c.data.corpus, objective__references__reference_nll=str(tmp_path / "s")
    )
    _, said = short_runs.train(scored, tmp_path / "scored")
    assert any("is stored for training documents only" in line for line in said)
    assert "accuracy" not in short_runs.lines(tmp_path / "scored", "validation")[-1]
    quantized = f"--output={tmp_path / 'int4.safetensors'}"
    command("launch.quantize", f"--model={tmp_path / 'run'}", "--bits=4", "--method=rtn", quantized)
