"""Made tasks: right answers, no prompt twice or on both sides, and names that mean nothing."""

import ast
import itertools
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import batches, corpora, tokenizers
from lm.data.hashing import held_out
from lm.data.problems import problems
from lm.data.tasks import TASKS
from lm.data.tasks.corpus import COUNT, load_task
from lm.data.tasks.task import Draw
from lm.errors import InputError

NAMES = [
    "task:sums/400",
    "task:sums:digits=4/300",
    "task:chains:operations=5/400",
    "task:sorting/400",
    "task:copying/400",
    "task:countdown/400",
    "task:countdown:numbers=5:target=1000/300",
]


def load(name, split="train", fraction=0.3):
    return corpora.load(name, split, directory="", validation_fraction=fraction)


def records(name):
    """All records of a corpus, of both splits."""
    both = [load(name, split)[0] for split in ("train", "validation")]
    return [one.record for one in problems(both)]


def value(expression):
    """By Python's own parser, in fractions, without running anything."""

    def of(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        left, right = of(node.left), of(node.right)
        return {
            ast.Add: lambda: left + right,
            ast.Sub: lambda: left - right,
            ast.Mult: lambda: left * right,
            ast.Div: lambda: left / right,
        }[type(node.op)]()

    return of(ast.parse(expression, mode="eval").body)


def right(name, record):
    """Whether the answer of a record is right, found in another way than the task makes it."""
    prompt, answer = record["prompt"], record["answer"]
    if name.startswith(("task:sums", "task:chains")):
        return prompt.endswith("=") and str(value(prompt[:-1])) == answer
    if name.startswith("task:sorting"):
        numbers = list(map(int, re.fullmatch(r"sort (.*)=", prompt)[1].split()))
        return sorted(numbers) == list(map(int, answer.split()))
    if name.startswith("task:copying"):
        return prompt == f"copy {answer}="
    numbers, target = record["numbers"], record["target"]
    asked = f"make {target} from {' '.join(map(str, numbers))}="
    used = sorted(map(int, re.findall(r"\d+", answer)))
    return prompt == asked and used == sorted(numbers) == numbers and value(answer) == target


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_and_prompts_differ(name):
    found = records(name)
    assert len(found) == int(name.partition("/")[2])
    assert all(right(name, one) for one in found)
    wrong = [{**one, "answer": one["answer"] + "7"} for one in found]
    assert not any(right(name, one) for one in wrong)
    assert len({one["prompt"] for one in found}) == len(found)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from(sorted(TASKS)), st.integers(2, 6))
def test_answers_are_right_for_any_seed_and_argument(seed, name, argument):
    first = {"sums": "digits", "chains": "operations", "countdown": "numbers"}.get(name, "length")
    made = TASKS[name](**{first: argument})(Draw(seed))
    assert right(f"task:{name}", {"prompt": made.prompt, "answer": made.answer, **made.further})


def test_countdown_values_on_the_way_are_whole_and_not_negative():
    """So the stored answer can be worked out as taught at school; brackets only where needed."""
    for record in records("task:countdown:numbers=4/400"):
        tree = ast.parse(record["answer"], mode="eval").body
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp):
                assert value(ast.unparse(node)).denominator == 1
        for start, end in itertools.product(range(len(record["answer"])), repeat=2):
            text = record["answer"]
            if text[start] == "(" and text[end] == ")" and start < end:
                without = text[:start] + text[start + 1 : end] + text[end + 1 :]
                try:
                    same = ast.dump(ast.parse(without)) == ast.dump(ast.parse(text))
                except SyntaxError:
                    same = False
                assert not same, text


def test_the_draws_cover_what_they_are_drawn_from():
    numbers = [Draw(seed).between(3, 7) for seed in range(2000)]
    assert set(numbers) == set(range(3, 8))
    assert min(np.bincount(numbers)[3:]) > 300
    digits = [len(one["prompt"]) for one in records("task:sums/400")]
    assert set(digits) <= {4, 5, 6}
    assert {len(one["answer"].split()) for one in records("task:sorting/400")} == {2, 3, 4, 5}


def test_the_same_problems_on_every_machine():
    """Frozen: what a run was trained on must not change with a version of Python or of this."""
    first = [one["prompt"] for one in records("task:sums/400")[:4]]
    assert first == FROZEN["task:sums/400"]
    assert records("task:countdown/400")[0] == FROZEN["task:countdown/400"]
    ((one,), (two,)) = load("task:chains/50"), load("task:chains/50")
    assert [d.record for d in one.documents] == [d.record for d in two.documents]
    assert one.fingerprint == two.fingerprint
    (other,) = load("task:chains:seed=1/50")
    assert other.fingerprint != one.fingerprint
    (held,) = load("task:chains/50", "validation")
    assert held.fingerprint != one.fingerprint


FROZEN = {
    "task:sums/400": ["84+75=", "13+84=", "95+94=", "23+54="],
    "task:countdown/400": {
        "prompt": "make 64 from 16 23 25=",
        "answer": "23+25+16",
        "numbers": [16, 23, 25],
        "target": 64,
    },
}


def test_more_problems_begin_with_the_same():
    (few,), (many,) = load("task:sorting/50"), load("task:sorting/200")
    names = [document.name for document in many.documents]
    assert [document.name for document in few.documents] == names[: len(few.documents)]


def test_what_is_held_out_is_never_trained_on_whatever_the_count_and_the_seed():
    texts = {}
    for split in ("train", "validation"):
        found = load("task:sums/500,task:sums:seed=3/500,task:sums:digits=1,task:chains/500", split)
        texts[split] = {d.record["prompt"] for corpus in found for d in corpus.documents}
        assert all(held_out(t.encode(), 0.3) == (split == "validation") for t in texts[split])
    assert not texts["train"] & texts["validation"]
    assert len(texts["validation"]) > 100


def test_a_small_task_gives_all_that_it_has():
    """Without a count 10,000, or as many as there are; with one that is too high it is refused."""
    assert len(records("task:sums:digits=1")) == 100
    assert len(records("task:copying:length=1")) == 26
    assert len(records("task:copying")) == COUNT


def test_a_document_is_a_prompt_and_an_answer_and_can_be_pickled():
    (corpus,) = load("task:copying/40")
    copied = pickle.loads(pickle.dumps(corpus))
    assert copied.kind == "problems"
    for document, again in zip(corpus.documents, copied.documents, strict=True):
        assert document == again
        record = document.record
        assert document.name == record["prompt"]
        assert document.spans == ((record["prompt"], 0.0), (record["answer"], 1.0))
    with pytest.raises(IndexError):
        corpus.documents[40]


def test_supervised_batches_weigh_the_answers_alone():
    found = load("task:sums/200,task:copying/100", "validation")
    tokenizer = tokenizers.load("bytes", 0, found, directory="")
    rows = batches.evaluation_batches(
        found, tokenizer, batch_size=4, sequence_length=64, packing="best_fit"
    )
    learned = []
    for batch in rows:
        for row in range(4):
            segments = batch["segment_ids"][row]
            for segment in range(1, segments.max() + 1):
                at = segments == segment
                targets, weights = batch["targets"][row][at], batch["weights"][row][at]
                answer = targets[weights == 1]
                assert answer[-1] == tokenizer.end_of_text
                asked = tokenizer.decode(targets[weights == 0])
                learned.append((asked, tokenizer.decode(answer[:-1])))
        assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
    expected = [(one.record["prompt"], one.record["answer"]) for one in problems(found)]
    assert sorted(learned) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("task:sum", "no task 'sum', did you mean 'sums'"),
        ("task:", "no task ''"),
        ("task:countdwn/5", "did you mean 'countdown'"),
        ("task:sums/0", "count must be a whole number from 1 to 1000000, got '0'"),
        ("task:sums/-3", "count must be"),
        ("task:sums/", "count must be"),
        ("task:sums/1e9", "count must be"),
        ("task:sums/1000001", "count must be"),
        ("task:sums/" + "9" * 100_000, "count must be"),
        ("task:sums/٣", "count must be"),
        ("task:sums/5/5", "must be task:NAME"),
        ("task:sums\n/5", "no task"),
        ("task:sums:digit=3", "no argument 'digit', did you mean 'digits'"),
        ("task:sums:digits=0", "digits=0 must be from 1 to 15"),
        ("task:sums:digits=" + "9" * 10_000, "digits must be a whole number"),
        ("task:sums:digits", "digits must be a whole number"),
        ("task:sums:digits=2:digits=2", "has digits twice"),
        ("task:sums:digits=1/101", "has only about 100 different problems"),
        ("task:sums:__doc__=1", "no argument"),
        ("task:copying:length=1000000", "length=1000000 must be from 1 to 1000"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_arguments_are_checked_by_every_task():
    for factory in TASKS.values():
        for name in list(factory.__annotations__)[:-1]:
            with pytest.raises(ValueError, match=f"^{name}=0 must be from"):
                factory(**{name: 0})


def test_a_split_without_problems_is_refused():
    with pytest.raises(InputError, match="no text in its validation split"):
        load("task:sums/1", "validation", 0.0001)
    assert len(load_task("task:sums/1", "train", 0.0001).documents) == 1
