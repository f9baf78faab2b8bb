"""The attention of the last layer to the prompt, as `ss_token` takes it from a run's own step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from lm.model.trained import Trained
from lm.training import experiment, loop
from lm.training.forward import make_forward, make_training_statistics
from lm.training.gradients import make_gradients
from lm.training.logging import read_metrics
from lm.training.step import make_train_step
from objectives.weighted import weighted
from objectives.weighting import ss_token
from objectives.weighting.ss_token import prompt_tokens

FIRST = jnp.zeros((), jnp.int32)


def prompted(rows=8, seed=0):
    """A batch of two segments a row, each with a prompt of two or three tokens."""
    b = tiny.batch(rows, seed=seed)
    weights = jnp.where(b["positions"] < 2 + b["segment_ids"] % 2, 0.0, b["weights"] + 0.1)
    return b | {"weights": weights}


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = np.abs(np.asarray(y, np.float64)).max() + 1e-9
        np.testing.assert_allclose(x / scale, y / scale, atol=tolerance)


def test_a_prompt_is_what_nothing_predicts():
    batch = {
        "segment_ids": np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]]),
        "weights": np.array([[0, 0, 2.0, 1, 1, 0, 0.5, 0, 0]]),
    }
    got = prompt_tokens(jax.tree.map(jnp.asarray, batch))
    # Raw text, as in the second segment, has its first token; a token of weight 0 in the middle of
    # an answer counts, too. Padding may be anything.
    np.testing.assert_array_equal(got[0, :7], [1, 1, 1, 0, 1, 0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("gamma", "accumulation"), [(0.0, 4), (0.5, 1), (0.5, 4)])
def test_gradients_are_those_of_the_attention_given_as_a_constant(gamma, accumulation):
    model, b = tiny.model(), prompted()
    trained = Trained(tiny.params(model))
    weighting = ss_token(keep=0.5, gamma=gamma)
    history_BT = jax.random.uniform(jax.random.key(1), (8, 16))
    to_BT = prompt_tokens(b)

    def given(weighting, attention_BT=None):
        """The same with the history, and maybe the attention, as constants."""
        fixed = {"history_nll": history_BT}
        if attention_BT is not None:
            fixed["attention_to"] = attention_BT

        def weigh(statistics, batch, references, state, step):
            return weighting.weigh(statistics, batch, references | fixed, state, step)

        return weighting._replace(weigh=weigh)

    def run(weighting, attention):
        objective = weighted(weighting=weighting, z_loss=0.1)
        if not attention:
            objective = objective._replace(taps={})
        statistics = make_training_statistics(model, 16, objective)
        compute = make_gradients(statistics, objective, accumulation)
        return jax.jit(compute)(trained, b, (), FIRST)

    outputs = jax.jit(model.apply)(trained.params, tiny.inputs(b), taps={"attention_to": to_BT})
    share_BT = outputs.aux["attention_to"]
    constant = given(weighting, share_BT)._replace(uses_statistics=True)
    expected = run(constant, False)
    close(run(given(weighting), True), expected)
    assert 0.4 < expected[1]["kept_share"] < 0.65
    # Negative control: other attention keeps other tokens.
    other = run(given(weighting, -share_BT)._replace(uses_statistics=True), False)
    with pytest.raises(AssertionError):
        close(other, expected, 1e-2)


@pytest.mark.slow
def test_in_the_quantized_phase_it_is_that_of_the_weights_on_their_grids():
    config = tiny.config(
        quantization__bits=2.0, quantization__fused_cooldown=False, train__steps=1000, mesh__data=1
    )
    run = experiment.build(config, tiny.VOCAB, jax.devices()[:1])
    trained, b = jax.jit(run.init)(jax.random.key(0)).trained, prompted()
    on_grid = Trained(jax.jit(run.quantized.on_grid)(trained))

    def attention(trained, quantized=None):
        forward = make_forward(run.model, quantized, taps={"attention_to": prompt_tokens})
        return jax.jit(forward)(trained, b)[0].aux["attention_to"]

    close(attention(trained, run.quantized), attention(on_grid))
    with pytest.raises(AssertionError):
        close(attention(trained, run.quantized), attention(trained), 1e-3)


STEPS = {
    "objective__weighting": "ss_token",
    "objective__references__history_nll": "ema",
    "train__ema_decay": 0.9,
}


@pytest.mark.slow
def test_eight_devices_and_micro_batches_take_the_steps_of_one():
    batches = [prompted(seed=i) for i in range(2)]
    metrics, state = tiny.steps(batches, mesh__data=1, **STEPS)
    assert all(np.isfinite(m["loss"]) and 0.5 < m["kept_share"] < 0.75 for m in metrics)
    other, other_state = tiny.steps(
        batches, 8, mesh__data=2, mesh__tensor=2, mesh__sequence=2, train__accumulation=2, **STEPS
    )
    close(other, metrics, 1e-3)
    close(other_state.trained, state.trained, 1e-2)


@pytest.mark.slow
def test_a_run_takes_it_from_its_config_and_its_prompts(tmp_path):
    """Through the loop; by attention alone it needs no other reference."""
    lines = [{"prompt": f"{i} + {i} =", "response": f" {2 * i}, is it not?"} for i in range(80)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def run(name, gamma, **overrides):
        config = tiny.config(
            data__corpus=str(tmp_path / "corpus.jsonl"),
            data__packing="best_fit",
            model__layers=1,
            objective__weighting="ss_token",
            objective__ss_token__keep=0.5,
            objective__ss_token__gamma=gamma,
            train__steps=3,
            **overrides,
        )
        assert loop.train(config, str(tmp_path / name), lambda line: None).finished
        found = read_metrics(epath.Path(tmp_path / name))
        return [line for line in found if line["kind"] == "train"]

    both = run("both", 0.5, objective__references__history_nll="ema", train__ema_decay=0.9)
    attention = run("attention", 0.0)
    for line in both + attention:
        assert line["skipped_steps"] == 0
        assert 0.45 < line["kept_share"] < 0.65
    assert both[-1]["loss"] != attention[-1]["loss"]


@pytest.mark.slow
def test_a_step_grows_by_the_queries_and_keys_of_one_layer():
    """FLOPs of the compiled step; a scan's body counts once, so layers are unrolled."""
    b = prompted()
    b = jax.tree.map(lambda x: jnp.tile(x, (1, 16)), b)

    def flops(gamma):
        config = tiny.config(
            data__sequence_length=256,
            model__unroll=2,
            mesh__data=1,
            objective__weighting="ss_token",
            objective__references__history_nll="ema",
            objective__ss_token__gamma=gamma,
            train__ema_decay=0.9,
        )
        run = experiment.build(config, tiny.VOCAB, jax.devices()[:1])
        step = make_train_step(run.model, run.optimizer, run.schedule, run.objective, config)
        state = jax.eval_shape(run.init, jax.random.key(0))
        return jax.jit(step).lower(state, b).compile().cost_analysis()["flops"], run.model.config

    (without, _), (with_attention, c) = flops(1.0), flops(0.5)
    tokens, length = 8 * 256, 256
    projections = 2 * tokens * c.width * c.head_width * (c.heads + c.kv_heads)
    square = tokens * length * c.heads
    assert 0 < with_attention - without < projections + 2 * square * c.head_width + 10 * square
    assert with_attention < 1.2 * without
