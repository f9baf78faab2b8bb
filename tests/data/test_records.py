"""Files of records in every form, hostile ones included; documents without a target."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
import tiny

from lm.data import converted, corpora, json_lines, tokenizers
from lm.data.documents import Corpus, Document
from lm.data.targets import count_without_target
from lm.errors import InputError

RECORDS = [{"text": f"number {i} é"} for i in range(12)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def load(path, cache, split="train"):
    (corpus,) = corpora.load(str(path), split, directory=str(cache), validation_fraction=0.3)
    return corpus


def texts(path, cache):
    both = [load(path, cache, split) for split in ("train", "validation")]
    return sorted(document.text for corpus in both for document in corpus.documents)


def zstandard(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


def parquet(content):
    import io

    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    output = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(RECORDS), output)
    return output.getvalue()


DAMAGED = gzip.compress(LINES)[:10] + b"\xff" * 40

FORMS = {
    "a.jsonl": lambda lines: lines,
    "a.JSONL": lambda lines: lines,
    "a.ndjson": lambda lines: lines,
    "mark.jsonl": lambda lines: b"\xef\xbb\xbf" + lines,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": zstandard,
    "a.json": lambda lines: json.dumps(RECORDS).encode(),
    "indented.json": lambda lines: b"\xef\xbb\xbf\n" + json.dumps(RECORDS, indent=1).encode(),
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_documents(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FORMS[name](LINES))
    assert texts(path, tmp_path / "cache") == sorted(record["text"] for record in RECORDS)
    converted = list((tmp_path / "cache").rglob("*"))
    assert not any(p.suffix == ".tmp" for p in converted)


HOSTILE = {
    "compressed": ("a.jsonl", gzip.compress(LINES), r"a\.jsonl: .*compressed; name it \.gz"),
    "utf-16": ("a.jsonl", LINES.decode().encode("utf-16"), r"UTF-16; save it as UTF-8"),
    "array": ("a.jsonl", json.dumps(RECORDS).encode(), r"a\.jsonl:1: an array, not an object"),
    "digits": (
        "a.jsonl",
        b'{"text": "a", "n": ' + b"1" * 5000 + b"}",
        r"a\.jsonl:1: not a line",
    ),
    "brackets": ("a.jsonl", b"\n" + b'{"a":' * 100_000, r"a\.jsonl:2: not a line of JSON"),
    "object": ("a.json", b'{"text": "a"}', r"a\.json: must be a list of records; name"),
    "deep": ("a.json", b"[" * 100_000, r"a\.json: cannot be read"),
    "no comma": ("a.json", b'[{"text": "a"} {"text": "b"}]', r"no comma after element 1"),
    "more": ("a.json", b'[{"text": "a"}] {}', r"more after the end of the array"),
    "no end": ("a.json", b'[{"text": "a"}, ', r"a\.json: cannot be read: element 2"),
    "no mark": ("a.jsonl", LINES.decode().encode("utf-16-be"), r"UTF-16; save it as UTF-8"),
    "damaged": ("a.jsonl.gz", DAMAGED, r"a\.jsonl\.gz: cannot be read"),
    "cut": ("a.jsonl.gz", gzip.compress(LINES)[:-9], r"a\.jsonl\.gz: cannot be read"),
    "bomb": ("a.jsonl.gz", gzip.compress(bytes(50_000_000), 9), r"grows by more than 1000"),
    "no parquet": ("a.parquet", b"PAR1 and no more", r"a\.parquet: "),
}


@pytest.mark.parametrize(("name", "content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_in_one_line(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.data.converted._MOST_GROWTH", 1000)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load(path, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_a_file_is_parsed_once_for_both_splits_and_kept_as_an_index(tmp_path, monkeypatch):
    path = tmp_path / "big.jsonl"
    records = (json.dumps({"text": f"{i} " + "x" * 2000}).encode() for i in range(2000))
    path.write_bytes(b"".join(record + b"\n" for record in records))
    parsed = []
    parse = json_lines._parse
    monkeypatch.setattr(json_lines, "_parse", lambda *a: parsed.append(1) or parse(*a))
    tracemalloc.start()
    both = [load(path, tmp_path, split) for split in ("train", "validation")]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(parsed) <= 2000 + 2  # and one document of each split, to see that there is text
    assert sum(len(corpus.documents) for corpus in both) == 2000
    assert peak < path.stat().st_size / 4


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_messages_and_documents_name_the_original(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FORMS[name](LINES))
    assert load(path, tmp_path / "cache").documents[0].name.startswith(f"{name}:")
    bad = [{"text": "a"}, {"text": 5}]
    lines = "".join(json.dumps(record) + "\n" for record in bad).encode()
    path.write_bytes(json.dumps(bad).encode() if name == "a.json" else gzip.compress(lines))
    with pytest.raises(InputError, match=rf"{path}:2: text must be a string, got int"):
        load(path, tmp_path / "cache")


def test_elements_may_span_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "_CHUNK", 5)
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(RECORDS, indent=1).encode())
    assert texts(path, tmp_path / "cache") == sorted(record["text"] for record in RECORDS)


@pytest.mark.parametrize("name", tiny.mostly_slow(["a.jsonl", "a.json"], ("a.jsonl",)))
def test_many_short_records_take_the_memory_of_their_index(name, tmp_path, monkeypatch):
    monkeypatch.setattr(converted, "_CHUNK", 1 << 14)
    count = 20_000
    records = [json.dumps({"text": str(i)}) for i in range(count)]
    content = "[" + ",".join(records) + "]" if name == "a.json" else "\n".join(records)
    (tmp_path / name).write_text(content)
    tracemalloc.start()
    corpus = load(tmp_path / name, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus.documents) > count / 2
    assert peak < 100 * count  # The index is 25 bytes a record, twice while it is made.


def test_documents_and_rows_without_a_target_are_counted():
    spans = [(("p" * 20, 0.0), ("r", 1.0)), (("q" * 9, 0.0),), (("text", 1.0),)]
    documents = [Document(str(i), spans) for i, spans in enumerate(spans)]
    corpus = Corpus("toy", documents, "f", 0)
    found = count_without_target((corpus,), tokenizers.Bytes(), 10)
    # 22 positions are rows of 10, 10 and 2, of which the targets are in the last one.
    assert found == (3, 5, 1, 3)
    assert "3 of 5 rows" in found.describe()
    assert count_without_target((corpus,), tokenizers.Bytes(), 30).empty_rows == 1
    whole = Corpus("toy", documents[2:], "f", 0)
    assert count_without_target((whole,), tokenizers.Bytes(), 10).describe() == ""
    assert count_without_target((corpus,), tokenizers.Bytes(), 10, 25).documents == 1
    assert isinstance(found.rows, int | np.integer)
