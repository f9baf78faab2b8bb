import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from absl import flags

from lm.data import scores
from lm.data.batches import train_batches
from lm.data.documents import Corpus, Document
from lm.data.layout import encode_document
from lm.data.tokenizers import Bytes
from lm.errors import InputError


def corpus(count=12, name="fake", seed=0):
    rng = np.random.default_rng(seed)
    documents = [
        Document(f"{name}/{i}", ((f"{i}:", 0.0), ("x" * int(rng.integers(0, 40)), 1.0)))
        for i in range(count)
    ]
    return Corpus(name, documents, f"print of {name}", 0)


def value(document, sample):
    """Numbers that tell every position of every document from all others."""
    return np.float32(1000 * sample) + np.arange(len(encode_document(document, Bytes())))


def values(corpora, rows=1):
    documents = [document for each in corpora for document in each.documents]
    for sample, document in enumerate(documents):
        one = value(document, sample)
        yield one if rows == 1 else np.stack([one + row / 4 for row in range(rows)])


def written(folder, corpora, names=("reference_nll",)):
    scores.write(folder, corpora, "bytes", names, values(corpora, len(names)), {"step": 3})
    return scores.load(folder)


def batches(corpora, stored, **changes):
    options = {"batch_size": 4, "sequence_length": 16, "packing": "concat", "shuffle_rows": 4}
    return train_batches(corpora, Bytes(), seed=0, scores=stored, **(options | changes))


@pytest.mark.parametrize("packing", tiny.mostly_slow(["concat", "best_fit"], ("best_fit",)))
def test_scores_lie_where_their_targets_lie(packing, tmp_path):
    corpora = [corpus(), corpus(9, "other", 1)]
    both = written(tmp_path / "scores", corpora, ("reference_nll", "likelihood"))
    stored = {name: scores.stored(both, name, corpora, "bytes") for name in both.names}
    documents = [document for each in corpora for document in each.documents]
    whole = [
        (encode_document(document, Bytes()), value(document, sample))
        for sample, document in enumerate(documents)
    ]
    iterator = iter(batches(corpora, stored, packing=packing, mixture_weights=(1, 2)))
    seen = set()
    for _ in range(40):
        batch = next(iterator)
        assert batch["reference_nll"].dtype == np.float32
        live = batch["segment_ids"] > 0
        assert not batch["reference_nll"][~live].any()
        # The value says of which document and position it is; there the target is the same.
        samples, offsets = np.divmod(batch["reference_nll"][live].astype(int), 1000)
        np.testing.assert_array_equal(samples, batch["sample_ids"][live])
        for sample, offset, target in zip(samples, offsets, batch["targets"][live], strict=True):
            assert whole[sample][0]["targets"][offset] == target
            seen.add((sample, offset))
        np.testing.assert_array_equal(
            batch["likelihood"], np.where(live, batch["reference_nll"] + 0.25, 0)
        )
    assert len(seen) == sum(len(positions) for positions, _ in whole)


def test_a_folder_of_scores_serves_a_part_of_its_corpora_in_any_order(tmp_path):
    corpora = [corpus(), corpus(9, "other", 1)]
    both = written(tmp_path / "scores", corpora)
    (only,) = scores.stored(both, "reference_nll", corpora[1:], "bytes")
    document = corpora[1].documents[3]
    length = len(encode_document(document, Bytes()))
    np.testing.assert_array_equal(only.read(3, document, length), value(document, 12 + 3))


def test_the_header_says_what_it_holds(tmp_path):
    folder = tmp_path / "deep" / "scores"
    one = written(folder, [corpus()])
    assert one.names == ("reference_nll",)
    assert one.origin == {"step": 3}
    assert one.parts == (scores.Part("fake", "print of fake", 12, "0.array_record"),)
    assert scores.is_scores(folder)
    assert not scores.is_scores(folder.parent)


def damage_header(folder):
    (folder / scores.HEADER).write_text("{")


def lose_field(folder):
    header = json.loads((folder / scores.HEADER).read_text())
    del header["tokenizer"]
    (folder / scores.HEADER).write_text(json.dumps(header))


def lose_file(folder):
    (folder / "0.array_record").unlink()


def cut_file(folder):
    content = (folder / "0.array_record").read_bytes()
    (folder / "0.array_record").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("harm", [damage_header, lose_field, lose_file, cut_file])
def test_a_damaged_folder_is_refused(harm, tmp_path):
    folder = tmp_path / "scores"
    written(folder, [corpus()])
    harm(folder)
    with pytest.raises(InputError, match="scores") as caught:
        scores.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "corpora", "tokenizer", "message"),
    [
        ("likelihood", [corpus()], "bytes", "are reference_nll, not likelihood"),
        ("reference_nll", [corpus()], "abc", "the tokenizer bytes, not abc"),
        ("reference_nll", [corpus(name="b")], "bytes", "data.corpus 'b' as they are now.*of fake"),
        ("reference_nll", [corpus(13)], "bytes", "data.corpus 'fake' as they are now"),
    ],
)
def test_the_header_tells_scores_of_something_else(name, corpora, tokenizer, message, tmp_path):
    one = written(tmp_path / "scores", [corpus()])
    with pytest.raises(InputError, match=message):
        scores.stored(one, name, corpora, tokenizer)


def other_text(documents):
    documents[5] = documents[5]._replace(spans=(("5:", 0.0), ("y" * 7, 1.0)))


def other_name(documents):
    documents[5] = documents[5]._replace(name="renamed")


class Wide(Bytes):
    """Gives two tokens a byte."""

    def encode(self, text):
        ids, num_bytes = super().encode(text)
        return np.repeat(ids, 2), np.repeat(num_bytes, 2)


@pytest.mark.parametrize("workers", tiny.mostly_slow([0, 1], (0,)))
@pytest.mark.parametrize(
    ("change", "tokenizer", "message"),
    [
        (other_text, Bytes(), r"document 5 \(fake/5\) are those of other text"),
        (other_name, Bytes(), r"document 5 \(renamed\) are those of other text"),
        (None, Wide(), r"document \d+ \(fake/\d+\) are \d+, but it has \d+ positions"),
    ],
)
def test_a_document_that_changed_stops_the_stream(change, tokenizer, message, workers, tmp_path):
    if workers:
        flags.FLAGS.mark_as_parsed()
    one = corpus()
    stored = {
        "reference_nll": scores.stored(
            written(tmp_path / "s", [one]), "reference_nll", [one], "bytes"
        )
    }
    if change:
        change(one.documents)
    stream = train_batches(
        [one],
        tokenizer,
        batch_size=4,
        sequence_length=16,
        packing="concat",
        seed=0,
        shuffle_rows=1,
        scores=stored,
        workers=workers,
    )
    iterator = iter(stream)
    with pytest.raises(InputError, match=message):
        list(itertools.islice(iterator, 40))
    iterator.close()


def test_a_missing_score_is_named(tmp_path):
    (stored,) = scores.stored(
        written(tmp_path / "s", [corpus()]), "reference_nll", [corpus()], "bytes"
    )
    with pytest.raises(InputError, match=r"document 12 \(new\) cannot be read"):
        stored.read(12, Document("new", (("x", 1.0),)), 2)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    folder = tmp_path / "scores"
    with pytest.raises(ValueError, match="fewer values than documents"):
        scores.write(folder, [corpus()], "bytes", ["r"], iter([np.zeros(3)]), {})
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    with pytest.raises(InputError, match="is there already"):
        written(folder, [corpus()])
    with pytest.raises(InputError, match="not a local folder"):
        scores.check_new("gs://bucket/scores")


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path):
    program = f"""
import os, signal
import test_scores
from lm.data import scores
def values():
    for i, one in enumerate(test_scores.values([test_scores.corpus()])):
        if i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield one
scores.write({str(tmp_path / "scores")!r}, [test_scores.corpus()], "bytes", ["r"], values(), {{}})
"""
    root = Path(__file__).parent.parent.parent
    paths = os.pathsep.join([str(root), str(root / "tests"), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    assert done.returncode < 0
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".scores.unfinished-")
    with pytest.raises(InputError):
        scores.load(left)
    written(tmp_path / "scores", [corpus()])  # What is left is in nobody's way.


# Two values of a position as ids, three as numbers, and one more number.
FIELDS = {"ids": scores.Field("int32", 2), "numbers": scores.Field("float32", 3)}
WIDE = ("ids", "numbers", "plain")


def wide(corpora):
    documents = [document for each in corpora for document in each.documents]
    for sample, document in enumerate(documents):
        one = value(document, sample)
        ids = np.stack([one, one + 2**24 + 1], -1).astype(np.int32)
        yield ids, np.stack([one, -one, one / 3], -1).astype(np.float32), one


def write_wide(folder, corpora):
    scores.write(folder, corpora, "bytes", WIDE, wide(corpora), {}, FIELDS)
    return scores.load(folder)


@pytest.mark.parametrize("packing", tiny.mostly_slow(["concat", "best_fit"], ("best_fit",)))
def test_several_values_of_a_position_join_the_batch(packing, tmp_path):
    corpora = [corpus(), corpus(9, "other", 1)]
    one = write_wide(tmp_path / "scores", corpora)
    assert one.fields == (*FIELDS.values(), scores.Field())
    stored = {name: scores.stored(one, name, corpora, "bytes") for name in WIDE}
    iterator = iter(batches(corpora, stored, packing=packing))
    padded = 0
    for _ in range(10):
        batch = next(iterator)
        live, plain = batch["segment_ids"] > 0, batch["plain"]
        samples, offsets = np.divmod(plain[live].astype(int), 1000)
        np.testing.assert_array_equal(samples, batch["sample_ids"][live])
        np.testing.assert_array_equal(offsets, batch["sample_positions"][live])
        assert batch["ids"].dtype == np.int32
        np.testing.assert_array_equal(batch["ids"][..., 0], plain)
        # No float32 has these: the type is kept.
        second = np.where(live, plain.astype(int) + 2**24 + 1, 0)
        np.testing.assert_array_equal(batch["ids"][..., 1], second)
        expected = np.stack([plain, -plain, plain / 3], -1).astype(np.float32)
        np.testing.assert_array_equal(batch["numbers"], expected)
        assert batch["numbers"].shape == (4, 16, 3)
        padded += (~live).sum()
    assert padded or packing == "concat"


def test_a_folder_of_before_loads_as_it_was(tmp_path):
    """Its header has neither a format nor fields, and its records are the same bytes."""
    folder = tmp_path / "scores"
    written(folder, [corpus()], ("reference_nll", "likelihood"))
    header = json.loads((folder / scores.HEADER).read_text())
    del header["format"], header["fields"]
    (folder / scores.HEADER).write_text(json.dumps(header))
    (second,) = scores.stored(scores.load(folder), "likelihood", [corpus()], "bytes")
    document = corpus().documents[7]
    expected = value(document, 7) + np.float32(0.25)
    np.testing.assert_array_equal(second.read(7, document, len(expected)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3 is newer than 2"),
        ({"format": "x"}, "cannot be|not supported"),
        ({"fields": {"ids": {"dtype": "object", "width": 2}}}, "ids cannot have 2 values of type"),
        ({"fields": {"ids": {"dtype": "int32", "width": 2**40}}}, "ids cannot have 1099511627776"),
        ({"fields": {"ids": {"dtype": "int32", "width": -1}}}, "ids cannot have -1 values"),
        ({"fields": {"ids": {"dtype": "int32", "width": 2.5}}}, "ids cannot have 2.5 values"),
        ({"fields": {"other": {"dtype": "int32", "width": 2}}}, "other cannot have"),
        ({"fields": {"ids": 3}}, "scores that can be read"),
        ({"fields": [1]}, "scores that can be read"),
    ],
    ids=str,
)
def test_a_hostile_header_is_one_line(change, message, tmp_path):
    folder = tmp_path / "scores"
    write_wide(folder, [corpus()])
    header = json.loads((folder / scores.HEADER).read_text())
    (folder / scores.HEADER).write_text(json.dumps(header | change))
    with pytest.raises(InputError, match=message) as caught:
        scores.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width", [1, 3, 2**24])
def test_a_header_of_another_width_takes_no_memory(width, tmp_path):
    """The records say how long they are, before an array of that width is made."""
    folder = tmp_path / "scores"
    write_wide(folder, [corpus()])
    header = json.loads((folder / scores.HEADER).read_text())
    header["fields"]["ids"]["width"] = width
    (folder / scores.HEADER).write_text(json.dumps(header))
    (one,) = scores.stored(scores.load(folder), "ids", [corpus()], "bytes")
    document = corpus().documents[3]
    with pytest.raises(InputError, match=r"document 3 \(fake/3\) are .*, but it has \d+ positions"):
        one.read(3, document, len(encode_document(document, Bytes())))


def test_values_of_another_width_are_not_written(tmp_path):
    fields = {"ids": scores.Field("int32", 4), "numbers": scores.Field("float32", 3)}
    with pytest.raises(ValueError, match=r"values are \(\d+, 2\)"):
        scores.write(tmp_path / "s", [corpus()], "bytes", WIDE, wide([corpus()]), {}, fields)
    assert list(tmp_path.iterdir()) == []
