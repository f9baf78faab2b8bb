"""What each reward gives for which text, and how their section of a config is read."""

import ast
import re
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs import base
from lm.data import corpora
from lm.data.problems import problems
from lm.errors import InputError
from lm.rollouts.judge import Judge, Named
from lm.rollouts.make_rewards import make_rewards
from lm.rollouts.rewards import REWARDS
from lm.rollouts.rewards.countdown import evaluate
from lm.training.checks import check_numbers
from objectives.hyperparameters import hyperparameters


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("19", "19", 1),
        (" 19\n", "19 ", 1),
        ("19.", "19", 0),
        ("1 9", "19", 0),
        ("", "19", 0),
        ("x" * 10**6, "19", 0),
    ],
)
def test_exact(text, answer, value):
    assert REWARDS["exact"]()(text, {"answer": answer}) == value


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"so \boxed{42}.", "42", 1),
        (r"so \boxed{42}.", r"it is \boxed{42}", 1),
        (r"\boxed{41} no, \boxed{42}", "42", 1),
        (r"\boxed{42} no, \boxed{41}", "42", 0),
        (r"\boxed{x = 42}", "42", 1),
        (r"\boxed{42", "42", 0),
        (r"\boxed{41} and \boxed{42", "41", 1),
        ("42", "42", 0),
        (r"\boxed{}", "42", 0),
        (r"\boxed{\text{none}} 42", "42", 0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{-\dfrac{10}{20}}", "-.50", 1),
        (r"\boxed{1/2}", "0.5", 1),
        (r"\boxed{1/0}", "0.5", 0),
        (r"\boxed{1,234}", "1234", 1),
        (r"\boxed{1,234.50}", "1234.5", 1),
        (r"\boxed{12,34}", "1234", 0),
        (r"\boxed{−3}", "-3", 1),
        (r"\boxed{5-3}", "3", 1),
        (r"\boxed{2e3}", "2000", 1),
        (r"\boxed{1e-2}", "0.01", 1),
        (r"\boxed{1e999999999}", "2000", 0),
        (r"\boxed{0.3333}", "1/3", 0),
        (r"\boxed{{4}2}", "2", 1),
        (r"\boxed{\boxed{42}}", "42", 1),
        (r"\boxed{" + "9" * 100_000 + "}", "9" * 100, 0),
        (r"\boxed{42}", "#### 42", 1),
    ],
)
def test_boxed_number(text, answer, value):
    assert REWARDS["boxed_number"]()(text, {"answer": answer}) == value


def test_boxed_number_of_text_without_a_box():
    reward, record = REWARDS["boxed_number"](last_number=True), {"answer": "42"}
    assert reward("first 41, then 42.", record) == 1
    assert reward("first 42, then 41.", record) == 0
    assert reward(r"\boxed{41}, not 42", record) == 0
    assert reward("none", record) == 0
    with pytest.raises(ValueError, match="no number in the answer 'none'"):
        reward("42", {"answer": "none"})


@pytest.mark.parametrize("text", [r"\boxed{" * 50_000, "{" * 200_000, "1," * 20_000, "9/" * 20_000])
def test_boxed_number_reads_hostile_texts_quickly(text):
    start = time.process_time()
    REWARDS["boxed_number"](last_number=True)(text, {"answer": "42"})
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("arguments", "text", "value"),
    [
        ({"pattern": "[0-9]+"}, "19", 1),
        ({"pattern": "[0-9]+"}, "19 ", 0),
        ({"pattern": "[0-9]+", "search": True}, "is 19 ", 1),
        ({"pattern": "<a>.*</a>"}, "<a>1\n2</a>", 0),
        ({"pattern": "(?s)<a>.*</a>"}, "<a>1\n2</a>", 1),
    ],
)
def test_format(arguments, text, value):
    assert REWARDS["format"](**arguments)(text, {}) == value


@pytest.mark.parametrize("pattern", ["", "(", "a" * 1001, "*", "a{2,1}", "(?P<x>a)(?P<x>b)"])
def test_a_pattern_that_is_none_is_refused(pattern):
    with pytest.raises(ValueError, match=r"^pattern=.* must be a regular expression"):
        REWARDS["format"](pattern=pattern)


def test_a_pattern_that_backtracks_costs_the_texts_on_which_it_does():
    with Judge([("format", 1.0, {"pattern": "(a+)+b"})], 0.5) as judge:
        judged = judge.judge(["ab", "a" * 60, "b"], [{}] * 3)
    assert judged.failed == {"timeout": 1}
    assert judged.total_N[[0, 2]].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        # l -> reward, worked out from the formulas; the triangle also by the sheet's 178.5 -> .5.
        (
            {"budget": 100, "margin": 50},
            {0: 0, 100: 0, 101: -0.02, 125: -0.5, 150: -1, 151: -1, 9999: -1},
        ),
        (
            {"budget": 357, "shape": "triangle"},
            {0: 0, 119: 1 / 3, 357: 1, 476: 2 / 3, 714: 0, 9999: 0},
        ),
    ],
    ids=["linear", "triangle"],
)
def test_length_penalty(arguments, values):
    reward = REWARDS["length_penalty"](**arguments)
    for length, value in values.items():
        assert reward("€" * length, {}) == pytest.approx(value, abs=1e-12)
    if arguments["budget"] == 357:
        assert (reward("x" * 178, {}) + reward("x" * 179, {})) / 2 == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "budget=0 must be at least 1"),
        ({"budget": -1}, "budget=-1 must be at least 1"),
        ({"budget": 9}, "margin=0 must be at least 1 with shape='linear'"),
        ({"budget": 9, "shape": "round"}, "shape='round' must be one of: linear, triangle"),
        ({"budget": 9, "shape": "triangle", "margin": 1}, "margin=1 must be 0"),
    ],
)
def test_a_length_penalty_needs_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        REWARDS["length_penalty"](**arguments)


RECORD = {"numbers": [3, 7, 25, 3], "target": 46}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("25+3*7", 1),
        (" ( 25 ) + (7*3)\n", 1),
        ("25+3*7+3-3", 0),  # The third 3 is not there.
        ("3*(7+25/3)", 1),
        ("3/3*46", 0),
        ("46", 0),
        ("25+3*7=46", 0),
        ("25 + 21", 0),
        ("2 5+3*7", 0),
        ("-3+7", 0),
        ("25+3*7)", 0),
        ("(25+3*7", 0),
        ("25++21", 0),
        ("25/(3-3)", 0),
        ("7**3", 0),
        ("", 0),
        ("()", 0),
        ("٣", 0),
        ("__import__('os').abort()", 0),
        ("(" * 100_000, 0),
        ("(" * 60 + "25" + ")" * 60, 0),
        ("9" * 900, 0),
        ("25+3*7 ".rjust(2000), 0),
    ],
)
def test_countdown(text, value):
    assert REWARDS["countdown"]()(text, RECORD) == value


def test_countdown_may_reward_well_formed_expressions():
    reward = REWARDS["countdown"](well_formed=0.1)
    assert [reward(t, RECORD) for t in ("25+3*7", "25+3", "25+9", "25+")] == [1, 0.1, 0, 0]
    with pytest.raises(KeyError):
        reward("1", {"answer": "1"})
    with pytest.raises(ValueError, match=r"^well_formed=2 must be from 0 to 1"):
        REWARDS["countdown"](well_formed=2)


def reference(node):
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    left, right = reference(node.left), reference(node.right)
    if isinstance(node.op, ast.Add | ast.Sub):
        return left + right if isinstance(node.op, ast.Add) else left - right
    return left * right if isinstance(node.op, ast.Mult) else left / right


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join) | inner.map("({})".format)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS)
@example("8-3-2")
@example("8/4/2")
@example("2*3+4*5-6/4")
def test_expressions_have_the_value_that_python_gives_them(text):
    try:
        expected = reference(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate(text)
        return
    value, used = evaluate(text)
    assert value == expected
    numbers = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
    assert sorted(used) == sorted(numbers)


@settings(max_examples=150, deadline=None)
@given(st.text("0123456789+-*/() x\n٣", max_size=30))
def test_any_text_is_an_expression_or_refused(text):
    try:
        evaluate(text)
    except (ValueError, ZeroDivisionError):
        return
    # Python has no 007, and ends an expression with its line.
    plain = re.sub(r"\b0+(?=[0-9])", "", " ".join(text.split()))
    assert isinstance(ast.parse(plain, mode="eval").body, ast.BinOp | ast.Constant)


@pytest.mark.parametrize("task", ["countdown", "countdown:numbers=5"])
def test_the_stored_answers_of_countdown_have_the_full_reward(task):
    found = corpora.load(f"task:{task}/300", "train", directory="", validation_fraction=0.1)
    for problem in problems(found):
        assert REWARDS["countdown"]()(problem.record["answer"], problem.record) == 1
        assert REWARDS["exact"]()(problem.record["answer"], problem.record) == 1


def rollouts(**overrides):
    c = base.get_config().rollouts
    for name, value in overrides.items():
        section, _, key = name.rpartition("__")
        (c[section] if section else c)[key] = value
    return c


def test_the_default_is_exact():
    assert make_rewards(rollouts()) == (Named("exact", 1.0, {}),)


def test_rewards_have_weights_and_their_sections():
    c = rollouts(
        rewards="countdown, length_penalty",
        reward_weights=(1.0, 0.5),
        countdown__well_formed=0.2,
        length_penalty__budget=10,
        length_penalty__margin=5,
    )
    made = make_rewards(c)
    assert made == (
        Named("countdown", 1.0, {"well_formed": 0.2}),
        Named("length_penalty", 0.5, {"budget": 10, "shape": "linear", "margin": 5}),
    )
    with Judge(made, 20.0) as judge:
        judged = judge.judge(["25+3*7", "25+3*7  (yes)", "25"], [RECORD] * 3)
    assert judged.total_N.tolist() == pytest.approx([1, 0 - 0.5 * 3 / 5, 0.2])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rewards": "exakt"}, r"rollouts.rewards='exakt' is not one of: .*did you mean 'exact'"),
        ({"rewards": ""}, "rollouts.rewards='' is not one of"),
        ({"rewards": "exact,exact"}, "names 'exact' twice"),
        ({"reward_weights": (1.0, 2.0)}, r"reward_weights=\(1.0, 2.0\) must be 1 numbers"),
        ({"reward_weights": (float("nan"),)}, r"reward_weights=\(nan,\) must be 1 numbers"),
        ({"reward_weights": ("1",)}, "must be 1 numbers"),
        ({"reward_seconds": float("inf")}, "rollouts.reward_seconds=inf must be above 0"),
        ({"rewards": "length_penalty"}, "rollouts.length_penalty.budget=0 must be at least 1"),
        ({"rewards": "format"}, "rollouts.format.pattern='' must be a regular expression"),
        ({"rewards": "python_tests"}, "rollouts.python_tests.allow=False must be True"),
        (
            {"rewards": "python_tests", "python_tests__allow": True, "reward_seconds": 1.0},
            "rollouts.reward_seconds=1.0 must be above rollouts.python_tests.seconds=1.0",
        ),
    ],
)
def test_a_bad_section_is_refused_with_its_key(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        make_rewards(rollouts(**overrides))
    assert "\n" not in str(caught.value)


def test_seconds_have_a_least_value():
    c = base.get_config()
    c.rollouts.reward_seconds = 0.0
    with pytest.raises(InputError, match=r"rollouts.reward_seconds=0.0 must be at least 0.01"):
        check_numbers(c)


def test_every_hyperparameter_of_a_reward_is_a_key():
    sections = base.get_config().rollouts
    for name, factory in REWARDS.items():
        found = {key: default for key, (default, _) in hyperparameters(factory).items()}
        assert found == dict(sections.get(name, {}))
        assert factory.__doc__
