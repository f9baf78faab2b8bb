"""Files of records: what is read, in which form, and what is refused in one line."""

import gzip
import json
import sys
import tracemalloc

import pytest

from lm.data import corpora, json_lines, record_files
from lm.data.hashing import fingerprint, held_out
from lm.errors import InputError

RECORDS = [{"text": f"line {i} — é\n", "other": [i, {"a": "]"}]} for i in range(40)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def load(path, split="train", fraction=0.3):
    cache = str(path.parent / "cache")
    (corpus,) = corpora.load(str(path), split, directory=cache, validation_fraction=fraction)
    return corpus


def texts(path):
    return [d.text for s in ("train", "validation") for d in load(path, s).documents]


def write(path, content):
    path.write_bytes(content)
    return path


def zstd(content):
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


ARRAY = json.dumps(RECORDS, indent=1).encode()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.JSONL", lambda: LINES),
        ("a.ndjson", lambda: LINES),
        ("bom.jsonl", lambda: b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", lambda: gzip.compress(LINES)),
        ("a.NDJSON.GZ", lambda: gzip.compress(LINES)),
        ("a.jsonl.zst", lambda: zstd(LINES)),
        ("misnamed.jsonl", lambda: gzip.compress(LINES)),
        ("a.json", lambda: ARRAY),
        ("bom.json", lambda: b"\xef\xbb\xbf\n " + ARRAY),
        ("a.json.gz", lambda: gzip.compress(ARRAY)),
        ("array.jsonl", lambda: ARRAY),
    ],
)
def test_it_reads_the_same_documents(tmp_path, name, make):
    path = write(tmp_path / name, make())
    assert sorted(texts(path)) == sorted(record["text"] for record in RECORDS)
    assert all(d.name.startswith(f"{name}:") for d in load(path).documents)
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_compressed_and_plain_are_the_same_corpus(tmp_path):
    plain = load(write(tmp_path / "a.jsonl", LINES))
    packed = load(write(tmp_path / "b.jsonl.gz", gzip.compress(LINES)))
    assert plain.fingerprint == packed.fingerprint
    assert [d.spans for d in plain.documents] == [d.spans for d in packed.documents]


def test_a_plain_file_has_the_order_and_the_fingerprint_that_it_had(tmp_path):
    """Work directories check the fingerprint: it is of the kept lines, in order."""
    path = write(tmp_path / "a.jsonl", LINES)
    kept = [line for line in LINES.splitlines() if not held_out(line, 0.3)]
    assert load(path).fingerprint == fingerprint(kept)
    assert [d.text for d in load(path).documents] == [json.loads(line)["text"] for line in kept]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    numbers = [str(i) for i in range(20)]
    columns = {"prompt": numbers, "response": numbers, "n": list(range(20))}
    parquet.write_table(pyarrow.table(columns), path)
    spans = [d.spans for s in ("train", "validation") for d in load(path, s, 0.5).documents]
    assert sorted(spans) == sorted(((i, 0.0), (i, 1.0)) for i in numbers)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(InputError, match=r"a\.parquet:2: text must be a string, got NoneType"):
        load(path)
    parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(InputError, match=r"a\.parquet: needs text.*it has body"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "n": ' + b"7" * 5000 + b"}", r"a\.jsonl:1: .*too many digits"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a\.jsonl:1: .*nested too deeply"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: is an array; element 1: .*nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl: is UTF-16"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), r"a\.jsonl: is UTF-16"),
        ("a.jsonl", b"BZh91AY&SY", r"a\.jsonl: is compressed by bzip2"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-30], r"a\.jsonl\.gz: is compressed, but broken"),
        ("a.json", ARRAY[:-2], r"a\.json: is an array; "),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a\.json: is an array; no comma after elem"),
        ("a.jsonl", b'["a"]\n{"text": "a"}\n', r"a\.jsonl: is an array, with more after its end"),
        ("a.json", b'[{"text": "a"}, 5]', r"a\.json:2: must be a JSON object, got int"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: is Parquet, but cannot be read"),
        ("a.parquet", b"{}", r"a\.parquet: is not Parquet"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, content in (("a.parquet", b"PAR1"), ("a.jsonl.zst", b"\x28\xb5\x2f\xfd")):
        with pytest.raises(InputError, match=r"pip install pyarrow"):
            load(write(tmp_path / name, content))


def test_a_file_that_grows_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_GROWTH_FROM", 1000)
    monkeypatch.setattr(record_files, "_MOST_GROWTH", 20)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "' + b"a" * 3_000_000 + b'"}'))
    with pytest.raises(InputError, match=r"is compressed, and more than 20 times as large"):
        load(path)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_elements_may_span_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_CHUNK", 7)
    path = write(tmp_path / "a.json", ARRAY)
    assert sorted(texts(path)) == sorted(record["text"] for record in RECORDS)


def test_a_line_is_parsed_once_for_both_splits(tmp_path, monkeypatch):
    parsed = []
    parse = json_lines._parse
    monkeypatch.setattr(json_lines, "_parse", lambda *a: parsed.append(a[1]) or parse(*a))
    path = write(tmp_path / "a.jsonl", LINES)
    load(path), load(path, "validation")
    assert len(set(parsed)) == len(RECORDS)
    assert len(parsed) <= len(RECORDS) + 2  # The first text of each split is looked at.
    # Negative control: a changed file is indexed again.
    write(path, LINES + b'{"text": "one more"}\n')
    load(path)
    assert len(parsed) > 2 * len(RECORDS)


def test_the_memory_of_a_large_file_is_that_of_its_index(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"{i} " * 40}) + "\n")
    assert path.stat().st_size > 4_000_000
    tracemalloc.start()
    corpus = load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_700_000
    assert len(corpus.documents) > 10_000
