"""Records of pairs and of labelled answers: what they are read as, and what is refused."""

import json

import numpy as np
import pytest

from lm.data import corpora
from lm.data.layout import encode_document
from lm.data.tokenizers import Bytes
from lm.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def load(path, split="train"):
    (corpus,) = corpora.load(
        str(path), split, directory=str(path.parent / "cache"), validation_fraction=1e-9
    )
    return corpus


def write(folder, *records, name="a.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def targets(document):
    """The text of weight 0, and that of weight 1, in bytes; the end of text reads as |."""
    positions = encode_document(document, Bytes())
    shown = np.where(positions["targets"] == 256, ord("|"), positions["targets"])
    split = np.flatnonzero(np.diff(positions["weights"])) + 1
    return [
        (bytes(text.astype(np.uint8)).decode(), float(weight[0]))
        for text, weight in zip(
            np.split(shown, split), np.split(positions["weights"], split), strict=True
        )
    ]


def test_texts_are_a_prompt_of_weight_0_and_an_answer_with_its_end(tmp_path):
    path = write(tmp_path, {"prompt": "2+2=", "chosen": "4", "rejected": "five"})
    (pair,) = load(path).documents
    assert load(path).kind == pair.kind == "pairs"
    assert [targets(one) for one in pair.answers] == [
        [("2+2=", 0.0), ("4|", 1.0)],
        [("2+2=", 0.0), ("five|", 1.0)],
    ]
    path = write(tmp_path, {"prompt": "a", "completion": "b", "label": False}, name="b.jsonl")
    (one,) = load(path).documents
    assert (load(path).kind, one.label) == ("labelled", False)
    assert [targets(answer) for answer in one.answers] == [[("a", 0.0), ("b|", 1.0)]]


EARLIER = [user("Hi"), assistant("Hello"), user("2+2?")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": EARLIER, "chosen": [assistant("4")], "rejected": [assistant("five")]},
        {"chosen": [*EARLIER, assistant("4")], "rejected": [*EARLIER, assistant("five")]},
    ],
    ids=["prompt", "whole conversations"],
)
def test_messages_go_through_the_template_and_only_the_last_answer_counts(record, tmp_path):
    (pair,) = load(write(tmp_path, record)).documents
    opening = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [targets(one) for one in pair.answers] == [
        [(opening, 0.0), (f"{answer}<|im_end|>", 1.0), ("\n|", 0.0)] for answer in ("4", "five")
    ]


def test_answers_may_go_on_over_several_messages(tmp_path):
    chosen = [assistant("a"), user("b"), assistant("c")]
    record = {"prompt": [user("x")], "chosen": chosen, "rejected": [assistant("d")]}
    (pair,) = load(write(tmp_path, record)).documents
    weighted = [text for text, weight in targets(pair) if weight]
    assert weighted == ["a<|im_end|>", "c<|im_end|>"]


def test_conversations_that_are_equal_keep_an_answer(tmp_path):
    same = [*EARLIER, assistant("4")]
    (pair,) = load(write(tmp_path, {"chosen": same, "rejected": same})).documents
    assert pair.spans[-1] == ("4", 1.0)
    assert pair.spans == pair.rejected.spans


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHAT = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
LABELLED = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "has chosen, but no rejected"),
        ({"prompt": "a", "completion": "b"}, "has completion, but no label"),
        (PAIR | {"completion": "d"}, "has chosen and rejected and completion; valid"),
        (LABELLED | {"label": 1}, "label must be true or false, got 1"),
        (LABELLED | {"label": "true"}, "label must be true or false, got 'true'"),
        (PAIR | {"chosen": 3}, "chosen must be a text or a list of messages, got int"),
        (CHAT | {"rejected": []}, "rejected is an empty list; it must have a message"),
        (CHAT | {"prompt": "a"}, "prompt a text, chosen a list, rejected a list; valid: all texts"),
        (CHAT | {"chosen": [user("b")]}, "chosen must begin with a message of the assistant"),
        (CHAT | {"chosen": [{"role": "me"}]}, "chosen: message 1 has the role 'me'"),
        ({"chosen": "ab", "rejected": "ac"}, "needs prompt; only chosen and rejected that are li"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("b"), assistant("b")]},
            "chosen and rejected share no message at their beginning",
        ),
        ({"completion": "b", "label": True}, "needs prompt; it has completion, label"),
        ({"completion": "b", "label": True, "a\nb": 1}, "needs prompt; it has 'a\\nb, completion"),
        ({"prompt": "a", "b\nc": 1}, "needs text, or prompt and response"),
        ({"prompt": "a"} | {f"key {i}": 1 for i in range(1000)}, "needs text, or prompt and resp"),
        (CHAT | {"prompt": [{"role": "r" * 5000}]}, "message 1 has the role 'rrr"),
    ],
)
def test_a_bad_record_is_one_line_with_file_and_line(record, message, tmp_path):
    path = write(tmp_path, CHAT, record)
    with pytest.raises(InputError) as raised:
        load(path)
    text = str(raised.value)
    assert text.startswith(f"{path}:2: ")
    assert message in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 500


def test_a_file_has_records_of_one_kind(tmp_path):
    with pytest.raises(InputError, match=r":2: is of the kind labelled, the records before it are"):
        load(write(tmp_path, PAIR, LABELLED))


def test_records_of_text_that_have_a_label_stay_text(tmp_path):
    path = write(tmp_path, {"text": "a", "label": 3}, {"prompt": "a", "response": "b", "chosen": 1})
    assert load(path).kind == "text"
    assert [document.text for document in load(path).documents] == ["a", "ab"]


@pytest.mark.parametrize("records", [[PAIR, PAIR], [CHAT], [LABELLED]])
def test_parquet_and_arrays_carry_the_fields(records, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    expected = [one._replace(name="") for one in load(write(tmp_path, *records)).documents]
    (tmp_path / "a.json").write_text(json.dumps(records))
    columns = {name: [record[name] for record in records] for name in records[0]}
    parquet.write_table(
        pyarrow.table(columns | {"score": [0] * len(records)}), tmp_path / "a.parquet"
    )
    for name in ("a.json", "a.parquet"):
        found = load(tmp_path / name).documents
        for one, other in zip(found, expected, strict=True):
            assert [targets(a) for a in one.answers] == [targets(a) for a in other.answers]
            assert one.label is other.label
