"""Task files: what is read, and that everything else is refused in one line that names it."""

import json
import time

import pytest

from lm.errors import InputError
from lm.evaluation.tasks import records, yaml_file
from lm.evaluation.tasks.prompts import prompts
from lm.evaluation.tasks.task import read_task, read_tasks
from lm.evaluation.tasks.time_limit import limited

CHOICE = {
    "task": "choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}
ITEMS = [
    {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
    {"question": "1 + 2 =", "choices": ["2", "3"], "answer": 1},
]
WRITTEN = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{answer}}"}


@pytest.fixture
def make(tmp_path):
    """(changes, items) -> the path of a task file; None as a value leaves a key out."""

    def made(changes=None, items=ITEMS):
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
        path = tmp_path / "task.yaml"
        path.write_text(json.dumps({**CHOICE, **(changes or {})}))  # JSON is YAML
        return str(path)

    return made


def test_a_task_is_read(make):
    task = read_task(make())
    assert (task.name, len(task.documents), task.shots.count) == ("choice", 2, 0)
    (first, second) = prompts(task)
    assert (first.context, first.choices, first.target) == ("1 + 1 =", ("2", "3"), 0)
    assert second.target == 1
    assert len(list(prompts(task, 1))) == 1


@pytest.mark.parametrize(
    ("files", "split"),
    [("items.jsonl", "train"), (["items.jsonl", "items.jsonl"], "train")],
)
def test_files_without_splits_are_the_split_train(files, split, make):
    changes = {"dataset_kwargs": {"data_files": files}, "test_split": split}
    task = read_task(make(changes))
    assert len(task.documents) == 2 * (1 if isinstance(files, str) else len(files))


def test_a_file_of_the_working_directory_goes_before_one_beside_the_task(
    make, tmp_path, monkeypatch
):
    path, other = make(), tmp_path / "other"
    other.mkdir()
    (other / "items.jsonl").write_text(json.dumps(ITEMS[1]) + "\n")
    monkeypatch.chdir(other)
    assert len(read_task(path).documents) == 1


def test_an_array_of_records_and_fields_that_are_missing(make, tmp_path):
    path = make()
    (tmp_path / "items.jsonl").write_text(json.dumps([ITEMS[0], {"more": "\ud800x"}]))
    first, second = read_task(path).documents
    assert first == {**ITEMS[0], "more": None}
    assert second["more"] == "\ufffdx"


def test_a_template_sees_fields_and_keeps_its_line_ends(make):
    task = read_task(make({"doc_to_text": "Q: {{question}}\n\nA:\n"}))
    assert next(prompts(task)).context == "Q: 1 + 1 =\n\nA:\n"
    task = read_task(make({"doc_to_text": "{{question | regex_replace('[0-9]', 'N')}}"}))
    assert next(prompts(task)).context == "N + N ="


def test_texts_of_choices(make):
    task = read_task(make({"doc_to_choice": {"a": "yes", "b": "no"}, "doc_to_target": "no"}))
    assert next(prompts(task)).choices == ("yes", "no")
    task = read_task(make({"doc_to_choice": "{{[choices[1], question]}}"}))
    assert next(prompts(task)).choices == ("3", "1 + 1 =")


REFUSED = [
    ({"task": None}, "task is missing"),
    ({"dataset_path": "csv"}, "dataset_path=csv must be json"),
    ({"output_type": "guess"}, "output_type=guess is not one of: multiple_choice"),
    ({"doc_to_choices": "choices"}, "unknown key doc_to_choices; valid: task"),
    ({"process_docs": "f"}, "process_docs is for lm_eval alone"),
    ({"num_fewshot": True}, "num_fewshot=True must be int"),
    ({"num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
    ({"num_fewshot": 3}, "num_fewshot=3: there are 2 examples"),
    ({"num_fewshot": 2, "fewshot_split": "test"}, "num_fewshot=2: there are 1 examples"),
    ({"num_fewshot": 1, "fewshot_split": "dev"}, "fewshot_split=dev is no split"),
    ({"fewshot_config": {"doc_to_text": "x"}}, "fewshot_config.doc_to_text: valid are sampler"),
    ({"fewshot_config": {"sampler": "balanced"}}, "fewshot_config.sampler=balanced"),
    ({"repeats": 2}, "repeats=2 must be 1"),
    ({"test_split": "dev"}, "test_split=dev is no split of dataset_kwargs.data_files; valid: test"),
    ({"test_split": None}, "test_split is missing"),
    ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "data_files: no file none.jsonl"),
    ({"dataset_kwargs": {"data_files": {"test": []}}}, "data_files must be a file"),
    ({"dataset_kwargs": {"field": "x"}}, "dataset_kwargs.field: valid is data_files alone"),
    ({"doc_to_text": None}, "doc_to_text is missing, which output_type=multiple_choice needs"),
    ({"metric_list": [{"metric": "f1"}]}, "metric_list: metric=f1 is not one of: acc, acc_norm"),
    ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, "aggregation of acc must be"),
    ({"metric_list": [{"metric": "acc", "ignore_case": True}]}, "acc has no ignore_case"),
    ({"generation_kwargs": {}}, "generation_kwargs is for output_type=generate_until"),
    ({"filter_list": [{"name": "x", "filter": [{"function": "regex"}]}]}, "function=regex is not"),
    ({"metadata": {"stride": -2}}, "metadata.stride=-2 must be"),
    ({**WRITTEN, "generation_kwargs": {"do_sample": True}}, "answers are greedy"),
    ({**WRITTEN, "generation_kwargs": {"max_gen_toks": 0}}, "max_gen_toks=0 must be at least 1"),
    ({**WRITTEN, "generation_kwargs": {"until": 3}}, "generation_kwargs.until must be a text"),
    ({**WRITTEN, "generation_kwargs": {"top_p": 0.5}}, "generation_kwargs.top_p: valid are until"),
    ({**WRITTEN, "filter_list": [{"filter": []}]}, "an entry must have a name"),
    (
        {**WRITTEN, "filter_list": [{"name": "x", "filter": [{"function": "custom"}]}]},
        "function=custom is not one of: take_first",
    ),
    (
        {
            **WRITTEN,
            "filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "("}]}],
        },
        "no regular expression",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_a_key_that_is_not_valid_is_refused_in_one_line(changes, expected, make):
    path = make(changes)
    with pytest.raises(InputError) as refusal:
        read_task(path)
    message = str(refusal.value)
    assert message.startswith(path)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"doc_to_text": "{{nothing}}"}, "doc_to_text: 'nothing' is undefined"),
        ({"doc_to_text": "{{question"}, "doc_to_text: "),
        ({"doc_to_text": "{{''.__class__.__mro__}}"}, "doc_to_text: "),
        ({"doc_to_text": "{% for i in range(99999999) %}x{% endfor %}"}, "doc_to_text: "),
        ({"doc_to_text": "{{'x' * 999999999}}"}, "doc_to_text: it makes too much text"),
        ({"doc_to_text": "{{question | regex_replace('(', '')}}"}, "doc_to_text: "),
        ({"doc_to_choice": "answer"}, "doc_to_choice gives 0"),
        ({"doc_to_choice": "{{question}}"}, "doc_to_choice: '1 + 1 =' is no list"),
        ({"doc_to_choice": "{{'__import__(\"os\")'}}"}, "doc_to_choice: "),
        ({"doc_to_choice": ["a", ""]}, "valid: a list of strings, none empty"),
    ],
)
def test_what_a_document_lacks_is_refused_in_one_line(changes, expected, make):
    path = make(changes)
    with pytest.raises(InputError) as refusal:
        list(prompts(read_task(path)))
    message = str(refusal.value)
    assert message.startswith(path)
    assert expected.replace("'1 + 1 ='", "1 + 1 =") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("process_docs: !function utils.f\n", ":1: could not determine a constructor"),
        ("a: !!python/object/apply:os.system ['exit 1']\n", ":1: could not determine"),
        ("a: [1, 2\nb: 3\n", "not YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("[" * 100_000, "not YAML that can be read"),
        ("&a a: &b [*b]\n", "more than 100,000 values"),
        ("x: " + "y" * 1_000_001, "larger than 1,000,000 bytes"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(
                f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
                for old, new in zip("abcdefg", "bcdefgh", strict=True)
            ),
            "more than 100,000 values",
        ),
    ],
)
def test_a_file_that_is_no_task_is_refused_quickly(content, expected, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(content)
    before = time.process_time()
    with pytest.raises(InputError, match=r"^\S*task.yaml") as refusal:
        yaml_file.read_yaml(path)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert time.process_time() - before < 20


def test_files_of_documents_are_checked(make, tmp_path, monkeypatch):
    path, data = make(), tmp_path / "items.jsonl"
    for content, expected in [
        (b'{"a": 1}\n{"a":\n', "items.jsonl:2: not a line of JSON"),
        (b"[1, 2]", "items.jsonl: record 0: must be a JSON object, got int"),
        (b"\n\n", "has no record"),
        (b"\xff\xfea", "not JSON lines in UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "items.jsonl:1: not a line of JSON"),
    ]:
        data.write_bytes(content)
        with pytest.raises(InputError) as refusal:
            read_task(path)
        assert expected in str(refusal.value)
    monkeypatch.setattr(records, "_MOST_BYTES", 10)
    data.write_text(json.dumps(ITEMS[0]))
    with pytest.raises(InputError, match="valid: at most 10"):
        read_task(path)


def test_two_tasks_of_one_name_are_refused(make):
    path = make()
    with pytest.raises(InputError, match=r"--tasks: .* both have task=choice"):
        read_tasks([path, path], "--tasks")


def test_a_regular_expression_that_never_ends_is_stopped():
    import re

    with pytest.raises(InputError, match=r"takes longer than 0\.2 seconds"), limited("key", 0.2):
        re.search("(a+)+$", "a" * 60 + "b")
    with limited("key", 0.2):
        assert re.search("(a+)+$", "a" * 60)
