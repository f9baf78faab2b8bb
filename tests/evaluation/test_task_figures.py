"""Means and standard errors of tasks: closed forms, and answers that are made by hand."""

import json
import math

import numpy as np
import pytest

from lm.data.tokenizers import Bytes
from lm.errors import InputError
from lm.evaluation.tasks import figures
from lm.evaluation.tasks.answers import Matching, cut, matches, read_filters, read_matching
from lm.evaluation.tasks.encoding import Encoder
from lm.evaluation.tasks.evaluate import Machine, evaluate
from lm.evaluation.tasks.scoring import Scored
from lm.evaluation.tasks.task import read_task


def test_a_mean_has_the_standard_error_of_a_sample():
    found = figures.mean("acc", [1, 0, 0, 1, 1])
    assert found.value == 0.6
    assert found.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert figures.mean("acc", [1]).standard_error is None


def test_a_ratio_is_one_of_sums_and_its_error_that_of_many_draws():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 200, (2000, 60))
    sums = sizes * 1.5 + rng.normal(0, 10, sizes.shape)
    ratios = sums.sum(axis=1) / sizes.sum(axis=1)
    found = figures.ratio("x", sums[0], sizes[0])
    assert found.value == pytest.approx(ratios[0])
    errors = [figures.ratio("x", *one).standard_error for one in zip(sums, sizes, strict=True)]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.05)
    # The error of a mean of ratios would be another one.
    of_mean = figures.mean("x", sums[0] / sizes[0]).standard_error
    assert abs(of_mean - found.standard_error) > 0.02 * found.standard_error


def test_an_exponential_has_the_error_of_the_delta_method():
    found = figures.exponential(figures.Figure("x", 2.0, 0.1, 9))
    assert found.value == pytest.approx(math.exp(2))
    assert found.standard_error == pytest.approx(0.1 * math.exp(2))
    assert figures.exponential(figures.Figure("x", 800.0, None, 1)).value == math.inf


def write(tmp_path, items, **changes):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    task = {
        "task": "made",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps(task | changes))
    return read_task(str(path))


def machine(by_continuation=None, answers=()):
    """Scores continuations by hand, the total spread over their tokens; bytes are tokens."""

    def score(texts, greedy):
        found = []
        for text in texts:
            continuation = bytes(text.tokens[-text.scored :].tolist()).decode()
            total = by_continuation[continuation]
            found.append(Scored(np.full(text.scored, total / text.scored, np.float32), total > -1))
        return found

    return Machine(Encoder(Bytes(), True, 64, 257), score, lambda asked: list(answers))


ITEM = {"question": "Q:", "choices": ["a", "bb", "ééé"], "answer": 2}
# Each way to normalise prefers another choice: -3, -4, -8 in all; a character: -3, -2, -8 / 3; a
# byte: -3, -2, -8 / 6; a token, the space before them included: -1.5, -4 / 3, -8 / 7.
BY_HAND = {" a": -3.0, " bb": -4.0, " ééé": -8.0}


def test_each_way_to_normalise_has_its_own_choice(tmp_path):
    task = write(tmp_path, [ITEM, {**ITEM, "answer": "a"}])
    found = evaluate(task, machine(BY_HAND))
    first, second = found.items
    chosen = {m: first[f"choice_{m}"] for m in ("acc", "acc_norm", "acc_bytes", "acc_per_token")}
    assert chosen == {"acc": 0, "acc_norm": 1, "acc_bytes": 2, "acc_per_token": 2}
    assert first["tokens"] == [2, 3, 7]
    np.testing.assert_allclose(first["log_likelihoods"], [-3, -4, -8], rtol=1e-6)
    assert (first["right"], second["right"]) == ([2], [0])
    by_name = {figure.metric: figure for figure in found.figures}
    assert by_name["acc"].value == 0.5
    assert by_name["acc"].standard_error == pytest.approx(0.5)
    assert by_name["acc_norm"].value == 0.0
    # Turned round, another choice is the likeliest.
    turned = evaluate(task, machine(dict.fromkeys(BY_HAND, -2.0) | {" bb": -1.0}))
    assert [item["acc"] for item in turned.items] == [0, 0]


def test_pairs_compare_two_sentences_without_a_context(tmp_path):
    items = [{"good": "He is.", "bad": "He are."}, {"good": "We are.", "bad": "We is."}]
    changes = {"doc_to_text": "", "doc_to_choice": "{{[good, bad]}}", "doc_to_target": 0}
    task = write(tmp_path, items, **changes)
    scores = {" He is.": -3.0, " He are.": -5.0, " We are.": -9.0, " We is.": -4.0}
    found = evaluate(task, machine(scores))
    assert [item["acc"] for item in found.items] == [1, 0]


@pytest.mark.parametrize("answer", [3, -1, "c", None, [7], 1.5])
def test_a_right_choice_that_is_none_is_refused(answer, tmp_path):
    task = write(tmp_path, [{**ITEM, "answer": answer}])
    with pytest.raises(InputError, match=r"task.yaml: doc_to_target gives"):
        evaluate(task, machine(BY_HAND))


def test_words_bytes_and_tokens_of_a_long_text(tmp_path):
    text = "ab é\nc"
    changes = {"output_type": "loglikelihood_rolling", "doc_to_choice": None}
    task = write(tmp_path, [{"question": "", "answer": text}], **changes)
    found = evaluate(task, machine({text: -14.0}))
    by_name = {figure.metric: figure.value for figure in found.figures}
    assert by_name["word_perplexity"] == pytest.approx(math.exp(14 / 3))
    assert by_name["byte_perplexity"] == pytest.approx(math.exp(14 / 7))
    assert by_name["token_perplexity"] == pytest.approx(math.exp(14 / 7))
    assert by_name["bits_per_byte"] == pytest.approx(2 / math.log(2))


def test_one_continuation_has_a_perplexity_and_is_written_or_not(tmp_path):
    changes = {"output_type": "loglikelihood", "doc_to_choice": None}
    items = [{"question": "A", "answer": " x"}, {"question": "A", "answer": " y"}]
    found = evaluate(write(tmp_path, items, **changes), machine({" x": -0.5, " y": -2.5}))
    assert found.figures[0].value == pytest.approx(math.exp(1.5))
    assert [item["acc"] for item in found.items] == [1, 0]


def test_answers_pass_through_filters_and_are_compared(tmp_path):
    changes = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "doc_to_choice": None,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "filter_list": [
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": "[a-z]+"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    }
    items = [{**ITEM, "answer": 0}, {**ITEM, "answer": 1}]
    found = evaluate(write(tmp_path, items, **changes), machine(answers=[" a!", "BB"]))
    by_name = {figure.metric: figure.value for figure in found.figures}
    assert by_name == {"exact_match,word": 0.5, "exact_match,whole": 0.5}
    assert [item["filtered,word"] for item in found.items] == ["a", "[invalid]"]
    task = write(tmp_path, items, **changes | {"generation_kwargs": {"max_gen_toks": 64}})
    with pytest.raises(InputError, match="max_gen_toks=64 leaves no room for a prompt in the 64"):
        evaluate(task, machine(answers=[" a!", "BB"]))


def test_what_is_ignored_of_a_text():
    metric = {"metric": "exact_match", "ignore_punctuation": True, "regexes_to_ignore": [r"\$"]}
    how = read_matching([metric], ("exact_match",), "x")
    assert matches("$1,000.", "1000", how, "x")
    assert not matches("$1,000.", "1000", Matching(), "x")
    assert not matches("1001", "1000", how, "x")


def test_groups_of_a_regular_expression_and_what_ends_an_answer():
    step = {"function": "regex", "regex_pattern": r"(X)|(\d)(\d)?", "group_select": -1}
    (first,) = read_filters([{"name": "n", "filter": [step]}], True, "x")["n"]
    assert first("1 23 X 4") == "4"
    assert first("none") == "[invalid]"
    assert cut("a\nb;c", (";", "\n")) == "a"
    assert cut("abc", ("x",)) == "abc"
