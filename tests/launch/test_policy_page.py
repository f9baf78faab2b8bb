"""The page of a rollout: pulls are advantages on-policy, and the page shows what was drawn."""

import html
import re

import jax
import numpy as np
import pytest
from rollouts import tiny_policy
from rollouts.tiny_policy import LengthJudge, Run, answers
from test_inspect import Parsed

from launch import page, policy_page
from lm.data.problems import problems
from lm.rollouts.inspection import inspect_rollout


@pytest.fixture(scope="module")
def run():
    return Run(tiny_policy.config(train__batch_size=4))


@pytest.fixture(scope="module")
def found(run):
    texts = problems(run.data.validation)
    judge = LengthJudge(
        fails=lambda text, record: sum(map(ord, text)) % 3 == 0,
        reward=lambda text, record: sum(map(ord, text)) % 7,
    )
    with jax.set_mesh(run.built.mesh):
        return inspect_rollout(run.built, run.state, texts, run.data.tokenizer, judge, print)


def test_the_pull_of_a_token_is_the_advantage_of_its_answer(found):
    """On-policy GRPO: N dL/d log p = -A / length, times N answers by those with a reward."""
    batch, seen = found.batch, []
    drawn = int(sum(ids.max() for ids in batch["segment_ids"]))
    judged = [(row, places) for row, places in answers(batch) if len(places)]
    number = len(judged)
    for row, places in judged:
        advantage = batch["advantages"][row, places[0]]
        expected = drawn / number * advantage / len(places)
        np.testing.assert_allclose(found.pull[row, places], expected, rtol=1e-4, atol=1e-6)
        seen.append(advantage)
    assert len(seen) < drawn  # Some answers have no reward.
    assert max(seen) > 0.5
    assert min(seen) < -0.5
    assert not found.pull[batch["weights"] == 0].any()


def test_the_page_has_every_answer_with_its_reward(run, found):
    heading = page.Heading("sums<b>", "run", 7, "grpo(ddof=1)")
    content = policy_page.render(found, run.data.tokenizer, heading)
    seen = Parsed(content)
    drawn = int(sum(ids.max() for ids in found.batch["segment_ids"]))
    assert len(seen.texts) == drawn
    assert all(len(c["values"]) == len(seen.tokens) for c in seen.numbers["columns"])
    said = re.findall(r"<h3>(.*?)</h3>", content)
    failed = sum(not len(p) for _, p in answers(found.batch))
    assert said.count("no reward") == failed
    assert not {"src", "href", "onclick", "onerror"} & set(seen.attributes)
    asked = [html.unescape(x) for x in re.findall(r'<h2 class="asked">(.*?)</h2>', content)]
    assert asked
    assert all(re.fullmatch(r"\d+\+\d+=", text) for text in asked)
