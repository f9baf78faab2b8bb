"""What single objectives of preferences ask a step for: replaced tokens, taps, teachers."""

import jax
import numpy as np
import pytest
import test_preference_runs as runs

from lm.data import scores
from lm.data.layout import encode_document
from lm.errors import InputError
from lm.references.second_models import open_references
from lm.training import experiment
from lm.training.forward import make_training_statistics, token_keys
from lm.training.step import make_reference_models
from objectives.preference import tars
from objectives.preference.tars import perturbed

SHARE = {"objective__tars__share": 0.5}


def build(name, **changes):
    c = runs.config("dpo", objective__name=name, **changes)
    return experiment.build(c, 257, jax.devices()[:1])


@pytest.mark.slow
def test_replaced_tokens_are_read_by_policy_and_reference_and_drawn_anew_in_every_step():
    rows = runs.batch("dpo")
    run = build("tars", **SHARE)
    found, _ = runs.steps(run, rows)
    # The first step by hand: DPO on the batch with its tokens replaced, whose margin is 0.
    keys = token_keys(run.config.train.seed, 0, rows["targets"].shape)
    wanted = perturbed({**rows, "keys": keys}, 0.5)
    wanted = {name: np.asarray(x) for name, x in wanted.items() if name != "keys"}
    by_hand, _ = runs.steps(build("dpo"), wanted, count=1)
    runs.check(found[:1], by_hand)
    plain, _ = runs.steps(build("dpo"), rows, count=1)
    assert found[0]["log_probability_chosen"] > 0.8 * plain[0]["log_probability_chosen"]
    with pytest.raises(AssertionError):
        runs.check(found[:1], plain)
    assert found[1]["log_probability_chosen"] != found[0]["log_probability_chosen"]


@pytest.mark.slow
def test_replaced_tokens_are_the_same_in_micro_batches():
    rows = runs.batch("dpo")
    wanted, _ = runs.steps(build("tars", **SHARE), rows)
    found, _ = runs.steps(build("tars", train__accumulation=4, **SHARE), rows)
    runs.check(found, wanted)


def test_stored_references_of_replaced_tokens_are_refused(tmp_path):
    texts = (runs.corpus(4),)
    values = [
        np.zeros(sum(len(encode_document(a, runs.Bytes())) for a in d.answers)) for d in texts[0][1]
    ]
    scores.write(tmp_path / "s", texts, "bytes", ["reference_nll"], values, {})
    key = {"objective__references__reference_nll": str(tmp_path / "s")}
    with pytest.raises(InputError, match="replaces tokens of them; valid: a model"):
        open_references(build("tars", **key))
    assert tars(share=0.0).computed_references == ()


def test_a_teacher_that_an_objective_needs_is_asked_for():
    with pytest.raises(InputError, match=r"needs objective.references.teacher; valid: 'ema'"):
        build("sparse_po")
    build("sparse_po", objective__sparse_po__divergence=0.0)
    with pytest.raises(InputError, match=r"needs objective.references.reward_nll"):
        build("tgdpo")
    with pytest.raises(InputError, match=r"objective.kto.beta=0.0 must be above 0"):
        build("kto", objective__kto__beta=0.0)


def test_taps_of_the_model_and_of_its_teacher():
    key = {"objective__references__teacher": "base", "objective__sparse_po__mask": "activations"}
    run = build("sparse_po", **key)
    objective = run.objective._replace(taps={"hidden": lambda batch: ()})
    rows = {name: jax.numpy.asarray(x) for name, x in runs.batch("dpo").items()}
    with jax.set_mesh(run.mesh):
        state = jax.jit(run.init)(jax.random.key(0))
        models = make_reference_models(run.model, objective, run.config, None, None)(
            state.trained, {}
        )
        teachers = {"teacher": models["teacher"]}
        statistics = make_training_statistics(run.model, 0, objective)
        found, aux = jax.jit(lambda t, r: statistics(t, r, teachers))(state.trained, rows)
    # Adapters begin as nothing: the policy is its base.
    live = np.asarray(rows["weights"]) != 0
    hidden, of_reference = (np.asarray(aux[name])[live] for name in ("hidden", "reference_hidden"))
    np.testing.assert_allclose(hidden, of_reference, rtol=1e-5, atol=1e-6)
    assert np.abs(hidden).max() > 0.1
    np.testing.assert_allclose(np.asarray(found.other_loss)[live], 0, atol=1e-5)


def test_a_mask_token_is_one_of_the_vocabulary():
    with pytest.raises(InputError, match=r"tars\.mask_token=257 must be below the 257 entries"):
        build("tars", objective__tars__mask_token=257)
    assert build("tars", objective__tars__mask_token=256).objective.perturb
    # That of an objective that is not trained with does not matter.
    assert build("dpo", objective__tars__mask_token=257)
