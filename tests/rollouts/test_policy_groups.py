"""Which groups say something, and how dynamic sampling replaces the others."""

import jax
import numpy as np
import pytest
import tiny_policy
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import GROUP, LengthJudge, Run, answers

from lm.data.chats import Message
from lm.data.documents import Document
from lm.data.layout import encode_prompt
from lm.data.problems import Problem, problems
from lm.errors import InputError
from lm.rollouts.groups import chosen_groups, has_signal
from lm.rollouts.policy_source import groups_of_rollout
from lm.rollouts.problem_prompts import askable, padded, prompt_of, room_for


def test_a_group_has_signal_where_rewards_differ():
    nan = np.nan
    rewards = [1, 1, 1, 0, 0, 1, nan, 1, 1, nan, 0, 1, nan, nan, nan, nan, nan, 3]
    found = has_signal(np.array(rewards), 3)
    assert found.tolist() == [False, True, False, True, False, False]


def test_groups_are_replaced_by_those_of_later_draws():
    signals = [[1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    signals = [np.array(one, bool) for one in signals]
    assert chosen_groups(signals[:1]) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert chosen_groups(signals[:2]) == [(0, 0), (1, 2), (1, 3), (0, 3)]
    assert chosen_groups(signals) == [(0, 0), (1, 2), (1, 3), (2, 0)]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_whatever_can_be_replaced_is_and_nothing_else(groups, draws, seed):
    signals = list(np.random.default_rng(seed).random((draws, groups)) < 0.5)
    chosen = chosen_groups(signals)
    assert len(set(chosen)) == groups  # No group stands twice.
    kept = sum(bool(signals[draw][group]) for draw, group in chosen)
    assert kept == min(groups, int(np.sum(signals)))
    assert all(chosen[i] == (0, i) for i in range(groups) if signals[0][i])


@pytest.fixture(scope="module")
def run():
    return Run(tiny_policy.config(rollouts__dynamic=2))


def by_prompt(text, record):
    """Differs within a group where the first number is odd."""
    return len(text) % 2 if int(record["prompt"].split("+")[0]) % 2 else 0


def odd(run, batch):
    """Whether each group is one of those."""
    texts = problems(run.data.train)
    rows = list(answers(batch))[::GROUP]
    asked = [texts[int(batch["sample_ids"][row, places[0]])] for row, places in rows]
    return [int(problem.record["prompt"].split("+")[0]) % 2 for problem in asked]


def test_a_source_draws_again_for_groups_without_signal(run):
    judge = LengthJudge(reward=by_prompt)
    source = run.source(judge)
    replaced, steps = 0, range(4)
    for step in steps:
        before = len(judge.seen)
        batch = run.batch(source, step)
        draws = judge.seen[before:]
        assert len(draws) == source.metrics["draws"] <= 3
        asked = [record["prompt"] for _, records in draws for record in records[::GROUP]]
        assert len(set(asked)) == len(asked)
        found = list(answers(batch))
        rewards = np.array([batch["rewards"][row, places[0]] for row, places in found])
        given = np.array([batch["advantages"][row, places[0]] for row, places in found])
        signal = has_signal(rewards, GROUP)
        assert ((np.abs(given).reshape(-1, GROUP).max(axis=1) > 0) == signal).all()
        pairs = [pair for draw in draws for pair in zip(*draw, strict=True)]
        drawn = [by_prompt(*pair) for pair in pairs]
        first = has_signal(np.array(drawn[:16]), GROUP)
        assert source.metrics["groups_without_signal"] == pytest.approx(1 - first.mean())
        assert source.metrics["reward"] == pytest.approx(np.mean(drawn[:16]))
        could = has_signal(np.array(drawn), GROUP).sum()
        assert signal.sum() == min(4, could)
        assert source.metrics["replaced_groups"] == signal.sum() - first.sum()
        replaced += source.metrics["replaced_groups"]
        assert sum(odd(run, batch)) >= signal.sum()
        # What was known of the tokens has moved along with them.
        assert (batch["behaviour_log_probability"][batch["weights"] != 0] < 0).all()
        np.testing.assert_array_equal(
            [batch["group_ids"][row, places[0]] for row, places in found], np.arange(16) // GROUP
        )
    assert replaced > 0
    assert len(judge.seen) > len(steps)


def test_without_signal_anywhere_a_batch_has_no_advantages(run):
    judge = LengthJudge(reward=lambda text, record: 1.0)
    source = run.source(judge)
    batch = run.batch(source)
    assert len(judge.seen) == 3
    assert (batch["advantages"] == 0).all()
    assert (batch["weights"] != 0).any()
    assert source.metrics["groups_without_signal"] == 1
    assert source.metrics["solved"] == 1


@pytest.mark.parametrize(
    ("overrides", "shares", "valid"),
    [({"rollouts__group": 3}, 1, "multiple of 3"), ({"rollouts__group": 8}, 4, "multiple of 32")],
)
def test_groups_that_do_not_fit_are_refused(overrides, shares, valid):
    config = tiny_policy.config(**overrides)
    message = f"rollouts.group=.*16 answers of a rollout, 2 in each of .*{valid}"
    with pytest.raises(InputError, match=message) as caught:
        groups_of_rollout(config, 2, 7, shares)
    assert "\n" not in str(caught.value)
    assert groups_of_rollout(tiny_policy.config(), 2, 7, 4) == 4


def test_prompts_are_written_as_the_answers_will_follow(run):
    tokenizer = run.data.tokenizer
    document = Document("p", (("a", 0.0), ("b", 1.0)))

    def problem(prompt):
        return Problem("p", document, {"prompt": prompt, "answer": "b"})

    ids = prompt_of(problem("ab"), tokenizer)
    assert ids.tolist() == [tokenizer.beginning_of_text, 97, 98]
    said = [{"role": "user", "content": "ab"}]
    chat = prompt_of(problem(said), tokenizer)
    np.testing.assert_array_equal(chat, encode_prompt([Message("user", "ab")], tokenizer))
    assert len(chat) > len(ids)
    assert prompt_of(problem(""), tokenizer).tolist() == [tokenizer.beginning_of_text]
    found = padded([ids, ids[:1]], 4)
    np.testing.assert_array_equal(found["tokens"][0], [0, 256, 97, 98])
    np.testing.assert_array_equal(found["mask"], [[0, 1, 1, 1], [0, 0, 0, 1]])
    assert [room_for(length) for length in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]


def test_long_prompts_are_left_out_and_counted(run):
    tokenizer = run.data.tokenizer
    document = Document("p", (("a", 0.0), ("b", 1.0)))
    texts = [Problem("p", document, {"prompt": "x" * n, "answer": "b"}) for n in (2, 9, 3)]
    found = askable(texts, tokenizer, 4)
    assert found.kept.tolist() == [0, 2]
    assert found.lengths.tolist() == [3, 4]
    assert found.dropped == 1
    with pytest.raises(
        InputError, match=r"no prompt of 3 has at most 2 tokens, the shortest has 3"
    ):
        askable(texts, tokenizer, 2)
    source = Run(tiny_policy.config(rollouts__longest_prompt=6)).source()
    assert len(source.said) == 1
    assert "problems: their prompts are too long" in source.said[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 8}, {"data": 2, "tensor": 2}], ids=str)
def test_eight_devices_draw_what_one_does(mesh):
    overrides = {f"mesh__{axis}": size for axis, size in mesh.items()}
    many = Run(tiny_policy.config(**overrides), devices=int(np.prod(list(mesh.values()))))
    one = Run(tiny_policy.config())
    batches = [each.batch(each.source()) for each in (one, many)]
    for name in batches[0]:
        if name in ("behaviour_log_probability", "behaviour_entropy", "group_divergence"):
            np.testing.assert_allclose(*(b[name] for b in batches), rtol=1e-4, atol=2e-5)
        else:
            np.testing.assert_array_equal(*(b[name] for b in batches), err_msg=name)
    assert jax.device_count() == 8
