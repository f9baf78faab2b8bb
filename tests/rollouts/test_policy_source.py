"""The source of a policy gradient: what is in its batches, and that the same run draws the same."""

import json

import jax
import numpy as np
import pytest
import tiny_policy
from tiny_policy import GROUP, TEMPERATURE, LengthJudge, Run, answers

from lm.data.layout import BATCH, OPTIONAL, POLICY
from lm.data.problems import problems
from lm.errors import InputError
from lm.planning.ahead import abstract_batch
from lm.planning.benchmark import random_batch
from lm.rollouts import stored_rollout
from lm.rollouts.old_policy import make_old_log_probability
from lm.rollouts.problem_prompts import numbers_asked
from lm.training import experiment
from lm.training.forward import make_prediction_statistics, make_training_statistics
from lm.training.reporting import TIMED, sampling_figures
from lm.training.sources import Spent, check_keys
from objectives.policy import tw_grpo


@pytest.fixture(scope="module")
def run():
    return Run(tiny_policy.config(rollouts__reuse=2))


@pytest.fixture(scope="module")
def source(run):
    return run.source()


@pytest.fixture(scope="module")
def batches(run, source):
    """Of the first three steps: one rollout, the same again, the next one."""
    return [run.batch(source, step) for step in range(3)]


def test_log_probabilities_are_those_of_the_training_pass(run, batches):
    """In packed rows, for answers of unequal length, and not those of another temperature."""
    batch = batches[0]
    loss = run.built.objective.loss
    assert loss.temperature == TEMPERATURE
    drawn = batch["weights"] != 0
    assert batch["segment_ids"].max() == 2
    assert len({len(places) for _, places in answers(batch)}) > 1
    assert len({int(places[0]) for _, places in answers(batch)}) > 2
    off = {}
    for temperature in (TEMPERATURE, 1.0):
        found = make_prediction_statistics(run.built.model, 1024, None, loss, temperature)
        with jax.set_mesh(run.built.mesh):
            found = jax.jit(found)(run.state.trained, batch)
        pairs = (
            (found.log_probability, batch["behaviour_log_probability"]),
            (found.entropy, batch["behaviour_entropy"]),
        )
        off[temperature] = [np.abs(np.asarray(a) - b)[drawn].max() for a, b in pairs]
    assert max(off[TEMPERATURE]) < 1e-5
    assert min(off[1.0]) > 1e-2  # negative control


def test_rows_hold_whole_groups_of_prompts_with_their_answers(run, source, batches):
    batch = batches[0]
    check_keys(source, run.built.objective)
    assert batch.keys() == source.keys == (BATCH | POLICY).keys() - set(OPTIONAL)
    for name, dtype in {**BATCH, **POLICY}.items():
        if name in batch:
            assert batch[name].dtype == dtype
            assert batch[name].shape == (8, tiny_policy.LENGTH)
    texts = problems(run.data.train)
    found = list(answers(batch))
    assert len(found) == 16
    for number, (row, places) in enumerate(found):
        first = places[0]
        segment = np.flatnonzero(batch["segment_ids"][row] == batch["segment_ids"][row, first])
        np.testing.assert_array_equal(segment, np.arange(segment[0], places[-1] + 1))
        np.testing.assert_array_equal(np.diff(places), 1)
        asked = texts[int(batch["sample_ids"][row, first])].record["prompt"]
        ids = batch["tokens"][row, segment[0] : first + 1]
        assert ids[0] == run.data.tokenizer.beginning_of_text
        assert run.data.tokenizer.decode(ids) == asked
        assert set(batch["group_ids"][row, segment]) == {number // GROUP}
        drawn = batch["targets"][row, places]
        np.testing.assert_array_equal(drawn[:-1], batch["tokens"][row, places[1:]])
        assert not set(drawn[:-1]) & set(tiny_policy.ENDS)
        ended = drawn[-1] in tiny_policy.ENDS
        assert len(drawn) == tiny_policy.TOKENS or ended
        text = run.data.tokenizer.decode(drawn[: len(drawn) - ended])
        assert set(batch["rewards"][row, places]) == {len(text)}
    for name in POLICY.keys() & batch.keys() - {"group_ids"}:
        assert (batch[name][batch["weights"] == 0] == 0).all()
    assert (batch["group_ids"][batch["segment_ids"] == 0] == -1).all()
    first = [batch["rewards"][row, places[0]] for row, places in found]
    given = [batch["advantages"][row, places[0]] for row, places in found]
    lengths = [len(places) for _, places in found]
    groups = np.arange(16) // GROUP
    expected = run.built.objective.advantages(np.float64(first), groups, lengths)
    np.testing.assert_allclose(given, expected, rtol=1e-6)
    assert np.abs(given).max() > 0.1


def test_metrics_are_those_of_the_rollout(run, source, batches):
    batch = batches[2]
    found = list(answers(batch))
    rewards = np.float64([batch["rewards"][row, places[0]] for row, places in found])
    lengths = [len(places) for _, places in found]
    assert source.metrics["reward"] == pytest.approx(rewards.mean(), rel=1e-6)
    assert source.metrics["reward_std"] == pytest.approx(rewards.std(), rel=1e-6)
    assert source.metrics["response_length"] == pytest.approx(np.mean(lengths))
    assert source.metrics["solved"] == np.mean(rewards >= 1)
    equal = np.ptp(rewards.reshape(-1, GROUP), axis=1) == 0
    assert source.metrics["groups_without_signal"] == pytest.approx(equal.mean())
    assert source.metrics["rollout_age"] == 0
    assert source.metrics["failed_raised"] == 0
    assert all(value.dtype == np.float32 for value in source.metrics.values())
    assert source.spent.tokens == sum(lengths)  # The first draw compiled.
    assert min(source.spent.sampling, source.spent.judging, source.spent.compiling) > 0
    text = source.samples()
    assert text.count("prompt: ") == 4
    assert text.count("  reward ") == 16
    assert f"advantage {float(batch['advantages'][found[0][0], found[0][1][0]]):+.4f}" in text


def test_a_rollout_is_trained_on_for_reuse_steps(batches):
    jax.tree.map(np.testing.assert_array_equal, batches[0], batches[1])
    assert (batches[0]["targets"] != batches[2]["targets"]).any()
    asked = [set(batch["sample_ids"][batch["weights"] != 0]) for batch in batches]
    assert not asked[0] & asked[2]


def test_a_rollout_goes_on_from_its_state(run, source, batches):
    """In its middle without the train state; between two of them nothing is kept."""
    assert source.get_state()["streams"]  # One of two steps has been taken.
    state = json.loads(json.dumps(source.get_state()))
    expected, metrics = run.batch(source, 3), source.metrics
    assert source.get_state() == {"streams": {}}
    later, others = run.batch(source, 4), source.metrics
    source.set_state(state)
    again = jax.device_get(source.next(3, None))
    jax.tree.map(np.testing.assert_array_equal, expected, again)
    assert source.metrics == metrics
    source.set_state({"streams": {}})
    jax.tree.map(np.testing.assert_array_equal, later, run.batch(source, 4))
    assert source.metrics == others
    for broken in ({}, {"streams": {"0": {"parent": 3}}}, {"next_index": 3}):
        with pytest.raises(InputError, match="position of another source"):
            source.set_state(broken)


def test_the_state_of_several_processes_is_that_of_one(batches):
    whole = batches[0]
    halves = [{name: x[i * 4 : i * 4 + 4] for name, x in whole.items()} for i in (0, 1)]
    numbers = {"reward": np.float32(0.1), "reward_std": np.float32(np.nan)}
    streams = {str(i): stored_rollout.encode(rows, 1, numbers) for i, rows in enumerate(halves)}
    shape = whole["tokens"].shape
    rows, left, metrics = stored_rollout.decode({"streams": streams}, shape, whole.keys())
    jax.tree.map(np.testing.assert_array_equal, rows, whole)
    assert left == 1
    np.testing.assert_equal(metrics, numbers)
    with pytest.raises(InputError, match="another source"):
        stored_rollout.decode({"streams": {"0": streams["0"]}}, shape, whole.keys())


def test_the_order_of_problems_depends_on_seed_and_draw_alone():
    draws = [numbers_asked(3, draw, 4, 10) for draw in range(5)]
    for epoch in (0, 10):
        assert sorted(np.concatenate(draws)[epoch : epoch + 10]) == list(range(10))
    np.testing.assert_array_equal(draws[3], numbers_asked(3, 3, 4, 10))
    assert (np.concatenate(draws)[:10] != np.concatenate(draws)[10:]).any()
    assert (draws[0] != numbers_asked(4, 0, 4, 10)).any()
    assert sorted(numbers_asked(0, 0, 25, 10)) == sorted(
        [*range(10)] * 2 + list(numbers_asked(0, 4, 5, 10))
    )


def test_answers_without_a_reward_are_counted_and_not_trained_on(run, source):
    """A whole group, and one of another group."""
    numbers = []

    def fails(text, record):
        numbers.append(len(numbers))
        return numbers[-1] in (0, 1, 2, 3, 6)

    source._judge, before = LengthJudge(fails), source._judge
    source.set_state({"streams": {}})
    batch = run.batch(source, 6)
    source._judge = before
    assert len(list(answers(batch))) == 16
    live = [places for _, places in answers(batch)]
    assert [len(places) > 0 for places in live] == [i not in (0, 1, 2, 3, 6) for i in range(16)]
    for name in ("advantages", "rewards"):
        assert np.isfinite(batch[name]).all()
        assert (batch[name][batch["weights"] == 0] == 0).all()
    assert source.metrics["failed_raised"] == 5
    assert np.isfinite(source.metrics["reward"])
    assert "no reward" in source.samples()


def test_old_log_probabilities_are_those_of_the_trained_model(run, batches):
    """Before the first step they are those of the sampler, and 0 where nothing was drawn."""
    batch = batches[0]
    with jax.set_mesh(run.built.mesh):
        found = make_old_log_probability(run.built, False)(run.state.trained, batch)
    np.testing.assert_allclose(found, batch["behaviour_log_probability"], atol=1e-5)
    assert (np.asarray(found)[batch["weights"] == 0] == 0).all()


@pytest.mark.slow
def test_the_divergence_of_groups_is_that_of_the_training_pass(run, batches):
    """That which TW-GRPO differentiates in is that of the sampler in the first step."""
    batch, model = batches[0], run.built.model
    drawn, found = batch["weights"] != 0, {}
    for temperature in (TEMPERATURE, 1.0):
        objective = tw_grpo(released=True, sampling_temperature=temperature)
        measure = make_training_statistics(model, 100, objective)
        with jax.set_mesh(run.built.mesh):
            _, aux = jax.jit(measure)(run.state.trained, batch)
        found[temperature] = np.asarray(aux["group_divergence"])[drawn]
    sampled = batch["group_divergence"][drawn]
    np.testing.assert_allclose(found[TEMPERATURE], sampled, rtol=1e-3, atol=1e-4)
    assert np.abs(found[1.0] - sampled).max() > 0.1  # negative control


def test_the_time_of_drawing_is_told_from_that_of_training():
    """A step of 10 seconds: 2 of drawing 100 tokens, 1 of judging them."""
    found = sampling_figures(Spent(2.0, 1.0, 9.0, 100), 10.0)
    assert found == {
        "sampling_seconds": 2.0,
        "sampling_share": 0.2,
        "judging_share": 0.1,
        "sampled_tokens_per_second": 50.0,
    }
    assert found.keys() <= set(TIMED)
    assert "sampled_tokens_per_second" not in sampling_figures(Spent(judging=1.0), 10.0)


def test_planning_knows_what_is_in_a_batch(run, source, batches):
    """For launch.plan with a topology, and launch.benchmark."""
    wanted = set(run.built.objective.batch_keys)
    for planned in (abstract_batch(run.built), random_batch(run.built)):
        assert wanted <= planned.keys() <= source.keys
        for name, x in planned.items():
            assert (x.shape, x.dtype) == (batches[0][name].shape, batches[0][name].dtype)


BAD = {
    "no group": ({"rollouts__group": 0}, r"rollouts.group=0: objective.name='grpo' .* 1 or more"),
    "group of none": ({"objective__name": "weighted"}, "rollouts.group=4 is for a policy gradient"),
    "reuse of none": (
        {"objective__name": "weighted", "rollouts__group": 0, "rollouts__reuse": 3},
        "rollouts.reuse=3 is for a policy gradient",
    ),
    "share": ({"rollouts__share": 0.5}, "rollouts.share=0.5: .* draws all"),
    "greedy": ({"rollouts__temperature": 0.0}, "rollouts.temperature=0.0 must be above 0"),
    "bits of another objective": (
        {"objective__name": "weighted", "rollouts__group": 0, "rollouts__bits": 4.0},
        "rollouts.bits=4.0 is for a policy gradient",
    ),
    "bits twice": (
        {"rollouts__bits": 4.0, "quantization__bits": 4.0},
        "rollouts.bits=4 rounds weights that are trained in full precision.*valid: 16",
    ),
    "dynamic": ({"rollouts__group": 1, "rollouts__dynamic": 1}, "rollouts.dynamic=1 replaces"),
    "tokens": ({"rollouts__tokens": 33}, "rollouts.tokens=33 leaves no room"),
    "prompt": ({"rollouts__longest_prompt": 28}, "do not fit into data.sequence_length=32"),
    "top_p": ({"rollouts__top_p": 0.0}, "rollouts.top_p=0.0 must be above 0"),
    "soft-capped": (
        {"objective__name": "hapo", "model__logit_softcap": 5.0},
        "objective.name='hapo' draws tokens with temperatures of their own .*valid: 0 of either",
    ),
    "groups taken apart": (
        {
            "objective__name": "tw_grpo",
            "objective__tw_grpo__released": True,
            "train__accumulation": 2,
        },
        "train.accumulation=2: objective.name='tw_grpo' compares the answers of a group",
    ),
    "reuse": ({"rollouts__reuse": 0}, "rollouts.reuse=0 must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_in_one_line(name):
    overrides, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        experiment.build(tiny_policy.config(**overrides), 257, jax.devices()[:1])
    assert "\n" not in str(caught.value)
