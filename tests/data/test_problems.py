"""Problems in files of records: what is one, what is refused, and that they are read lazily."""

import json

import pytest

from lm.data import corpora, json_lines, tokenizers
from lm.data.batches import train_batches
from lm.data.layout import encode_document
from lm.data.pairs import Reading
from lm.data.problems import problems
from lm.errors import InputError

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(path, split="train", fraction=0.3):
    return corpora.load(str(path), split, directory="", validation_fraction=fraction)


def one(tmp_path, record):
    """The problem of one record."""
    (found,) = problems([corpora.read(write(tmp_path / "one.jsonl", [record]))])
    return found


@pytest.mark.parametrize(
    ("answer", "text"),
    [("4", "4"), (" 4\n", " 4\n"), ("", ""), (4, "4"), (-1.5, "-1.5"), (10**20, "1" + "0" * 20)],
)
def test_an_answer_is_a_text_or_a_number_as_its_text(tmp_path, answer, text):
    found = one(tmp_path, {"prompt": "2+2=", "answer": answer, "numbers": [2, {"a": None}]})
    assert found.document.spans == (("2+2=", 0.0), (text, 1.0))
    assert found.record == {"prompt": "2+2=", "answer": text, "numbers": [2, {"a": None}]}
    assert found.name == found.document.name == "one.jsonl:1"
    assert found.document.record is found.record
    assert found.document.kind == "problems"


def test_a_prompt_may_be_messages(tmp_path):
    found = one(tmp_path, {"prompt": CHAT, "answer": 4})
    assert found.document.roles == ("system", "user", "assistant")
    assert found.document.spans == (("be brief", 0.0), ("2+2", 0.0), ("4", 1.0))
    assert found.record["prompt"] == CHAT
    tokenizer = tokenizers.load("bytes", 0, (), directory="")
    positions = encode_document(found.document, tokenizer)
    answer = tokenizer.decode(positions["targets"][positions["weights"] == 1])
    assert answer.startswith("4")
    assert "2+2" not in answer


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a", "prompt": "p", "answer": "x"},
        {"prompt": "p", "response": "a", "answer": "x"},
        {"messages": [{"role": "assistant", "content": "a"}], "prompt": "p", "answer": "x"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "answer": "x"},
        {"prompt": "p", "completion": "a", "label": True, "answer": "x"},
    ],
    ids=lambda record: "+".join(record),
)
def test_other_records_are_what_they_were(tmp_path, record):
    corpus = corpora.read(write(tmp_path / "a.jsonl", [record]))
    (document,) = corpus.documents
    assert document.record is None
    assert corpus.kind != "problems"
    with pytest.raises(InputError, match=r"a\.jsonl' has no problems to solve but records") as got:
        problems([corpus])
    assert "\n" not in str(got.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "answer": None}, "answer must be a text or a number, got None"),
        ({"prompt": "p", "answer": True}, "answer must be a text or a number, got True"),
        ({"prompt": "p", "answer": float("nan")}, "answer must be a text or a number, got nan"),
        ({"prompt": "p", "answer": ["4"]}, "answer must be a text or a number"),
        ({"prompt": 7, "answer": "4"}, "prompt must be a text or a list of messages, got int"),
        ({"prompt": "", "answer": "4"}, "prompt is empty"),
        ({"prompt": [], "answer": "4"}, "prompt is empty"),
        ({"prompt": [{"role": "me"}], "answer": "4"}, "prompt: message 1 has the role"),
        ({"answer": "4"}, "needs text, or .* or prompt and answer, .*; it has answer"),
        ({"prompt": "p", "response": "r"}, "is of the kind text, the records before it are prob"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "is of the kind pairs"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "a"}, record])
    with pytest.raises(InputError, match=rf"a\.jsonl:2: {message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_number_of_very_many_digits_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "answer": ' + "1" * 5000 + "}\n")
    with pytest.raises(InputError, match=r"a\.jsonl:1: not a line of JSON that can be read"):
        load(path)


def test_text_that_utf8_cannot_hold_is_repaired_in_the_record_as_well(tmp_path):
    path = tmp_path / "a.jsonl"
    half = "\ud800"
    write(path, [{"prompt": half + "p", "answer": "a" + half, "more": {half: [half]}}])
    corpus = corpora.read(str(path))
    (found,) = problems([corpus])
    bad = "\ufffd"
    assert found.record == {"prompt": bad + "p", "answer": "a" + bad, "more": {bad: [bad]}}
    assert found.document.text == bad + "pa" + bad
    assert corpus.replaced == 1


def test_problems_with_the_same_prompt_are_on_the_same_side(tmp_path):
    lines = [{"prompt": f"p{i % 40}", "answer": i} for i in range(200)]
    lines += [
        {"prompt": [{"role": "user", "content": f"p{i % 9}"}], "answer": i} for i in range(45)
    ]
    path = write(tmp_path / "a.jsonl", lines)
    sides = [problems(load(path, split)) for split in ("train", "validation")]
    train, held = ({str(one.record["prompt"]) for one in side} for side in sides)
    assert not train & held
    assert sum(map(len, sides)) == 245
    assert len(held) > 5


def test_problems_of_several_corpora_lie_one_after_the_other(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "answer": i} for i in range(20)])
    found = load(f"task:sums/30,{path}")
    both = problems(found)
    assert len(both) == sum(len(corpus.documents) for corpus in found)
    names = [document.name for corpus in found for document in corpus.documents]
    assert [one.name for one in both] == names
    with pytest.raises(IndexError):
        both[len(both)]
    with pytest.raises(IndexError):
        both[-1]


def test_only_the_problem_that_is_asked_for_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "answer": i} for i in range(300)])
    (corpus,) = load(path)
    parsed, parse = [], json_lines._parse
    monkeypatch.setattr(json_lines, "_parse", lambda *a: parsed.append(1) or parse(*a))
    found = problems([corpus])
    assert found[17].record["prompt"] == found[17].document.spans[0][0]
    assert len(found) == len(corpus.documents)
    assert len(parsed) == 2


def test_an_array_and_parquet_keep_all_values_that_json_has(tmp_path):
    records = [
        {"prompt": f"p{i}", "answer": f"{i}", "numbers": [i, 2], "x": {"y": 0.5}} for i in (1, 2)
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert [one.record for one in problems([corpora.read(str(tmp_path / "a.json"))])] == records
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist([{**one, "image": b"\0\1"} for one in records])
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "cache").mkdir()
    (corpus,) = corpora.load(
        str(tmp_path / "a.parquet"),
        "train",
        directory=str(tmp_path / "cache"),
        validation_fraction=1e-9,
    )
    assert [one.record for one in problems([corpus])] == records


def test_an_objective_of_preferences_refuses_problems(tmp_path):
    found = load("task:sums/300")
    with pytest.raises(
        InputError, match=r"'task:sums/300' has records of the kind problems, but dpo"
    ):
        train_batches(
            found,
            tokenizers.load("bytes", 0, found, directory=""),
            batch_size=2,
            sequence_length=16,
            packing="best_fit",
            seed=0,
            shuffle_rows=1,
            reading=Reading("dpo"),
        )
