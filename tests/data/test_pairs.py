"""Rows of preference data against the answers of each record alone."""

import itertools
import json

import numpy as np
import pytest
import tiny

from lm.data import packing, scores
from lm.data.batches import evaluation_batches, train_batches
from lm.data.documents import Corpus, Document
from lm.data.layout import encode_document
from lm.data.pairs import Reading, encode_record, usable
from lm.data.tokenizers import Bytes
from lm.errors import InputError

PAIRED, UNPAIRED = Reading("dpo"), Reading("bco", unpaired=True)
MISMATCHED = Reading("kto", unpaired=True, mismatched=True)
LENGTH = 64


@pytest.fixture(autouse=True)
def few_open_rows(request, monkeypatch):
    """Rows are finished soon, but where the padding is measured."""
    if "padding" not in request.node.name:
        monkeypatch.setattr(packing, "_OPEN_ROWS", 4)


def answer(prompt, text, **fields):
    return Document(f"of {prompt}", ((prompt, 0.0), (text, 1.0)), **fields)


def pairs(count=40, name="pairs", median=8, seed=0):
    """Prompts that differ, answers of lognormal lengths."""
    rng = np.random.default_rng(seed)
    sizes = np.clip(rng.lognormal(np.log(median), 0.7, (count, 2)), 1, 3 * median).astype(int)
    documents = [
        answer(f"{name[0]}{i}?", "c" * a, rejected=answer(f"{name[0]}{i}?", "r" * b))
        for i, (a, b) in enumerate(sizes.tolist())
    ]
    return Corpus(name, documents, name, 0, "pairs")


def labelled(count=40, seed=1):
    rng = np.random.default_rng(seed)
    documents = [
        answer(f"q{i}?", f"{i}" * int(rng.integers(1, 6)), label=bool(i % 3)) for i in range(count)
    ]
    return Corpus("labelled", documents, "labelled", 0, "labelled")


def train(corpora, reading, **changes):
    options = {"batch_size": 4, "sequence_length": LENGTH, "shuffle_rows": 4, "seed": 0}
    return train_batches(
        corpora, Bytes(), packing="best_fit", reading=reading, **(options | changes)
    )


def evaluate(corpora, reading, **changes):
    options = {"batch_size": 4, "sequence_length": LENGTH, "packing": "best_fit"}
    return evaluation_batches(corpora, Bytes(), reading=reading, **(options | changes))


def rows(batches):
    for batch in batches:
        for i in range(len(batch["tokens"])):
            yield {name: x_BT[i] for name, x_BT in batch.items()}


def segments(row):
    for segment in range(1, row["segment_ids"].max() + 1):
        inside = row["segment_ids"] == segment
        yield {name: x_T[inside] for name, x_T in row.items()}


def same(segment, document):
    expected = encode_document(document, Bytes())
    for name in expected.dtype.names:
        np.testing.assert_array_equal(segment[name], expected[name])
    np.testing.assert_array_equal(segment["positions"], np.arange(len(expected)))


def test_a_pair_is_two_segments_of_one_row_and_each_is_evaluated_once():
    corpora, seen = [pairs(), pairs(7, "others", seed=3)], []
    documents = [document for corpus in corpora for document in corpus.documents]
    for row in rows(evaluate(corpora, PAIRED)):
        padding = row["segment_ids"] == 0
        assert (row["pair_ids"][padding] == -1).all()
        assert not row["sides"][padding].any()
        assert not row["weights"][padding].any()
        found = list(segments(row))
        for number, (chosen, rejected) in enumerate(zip(found[::2], found[1::2], strict=True)):
            (sample,) = {*chosen["sample_ids"], *rejected["sample_ids"]}
            seen.append(int(sample))
            for segment, side, one in zip(
                (chosen, rejected), (1, -1), documents[sample].answers, strict=True
            ):
                same(segment, one)
                assert (segment["pair_ids"] == number).all()
                assert (segment["sides"] == side).all()
            both = np.concatenate([chosen["sample_positions"], rejected["sample_positions"]])
            np.testing.assert_array_equal(both, np.arange(len(both)))
    assert sorted(seen) == list(range(47))
    assert all(x.dtype == np.int32 for n, x in row.items() if n != "weights")


@pytest.mark.parametrize("corpus", [labelled(), pairs()], ids=["labelled", "pairs"])
def test_unpaired_answers_have_a_number_each(corpus):
    count = 0
    for row in rows(evaluate([corpus], UNPAIRED)):
        assert "mismatched_ids" not in row
        for number, segment in enumerate(segments(row)):
            assert (segment["pair_ids"] == number).all()
            document = corpus.documents[segment["sample_ids"][0]]
            side = int(segment["sides"][0])
            if document.label is None:
                same(segment, document.answers[0 if side == 1 else 1])
            else:
                same(segment, document)
                assert side == (1 if document.label else -1)
            count += 1
    assert count == sum(len(document.answers) for document in corpus.documents)


@pytest.mark.parametrize("corpus", [labelled(), pairs()], ids=["labelled", "pairs"])
def test_mismatched_answers_are_those_of_the_next_record_under_this_prompt(corpus):
    count = 0
    for row in rows(evaluate([corpus], MISMATCHED, sequence_length=128)):
        others = [s for s in segments(row) if s["mismatched_ids"][0] >= 0]
        assert [s["mismatched_ids"][0] for s in others] == list(range(len(others)))
        own = [s["pair_ids"][0] for s in segments(row) if s["pair_ids"][0] >= 0]
        assert own == list(range(len(own)))
        for place, segment in enumerate(others):
            assert (segment["mismatched_ids"] == segment["mismatched_ids"][0]).all()
            assert (segment["pair_ids"] == -1).all()
            assert not segment["sides"].any()
            index = segment["sample_ids"][0]
            here = corpus.documents[index]
            following = corpus.documents[(index + 1) % len(corpus.documents)]
            which = place % len(here.answers)
            expected = here.spans[:1] + following.answers[which].spans[1:]
            same(segment, Document("", expected))
            count += 1
    assert count == sum(len(document.answers) for document in corpus.documents)


def test_a_mismatched_answer_is_not_one_to_the_same_prompt():
    documents = [answer("a", "1", label=True), answer("a", "2", label=False)]
    corpus = Corpus("two", [*documents, answer("b", "3", label=True)], "two", 0, "labelled")
    record, _ = encode_record(corpus.documents, 0, Bytes(), MISMATCHED, LENGTH)
    assert bytes(record["targets"][record["answer"] == 1][:-1].astype(np.uint8)) == b"a3"
    none = Corpus("one", documents, "one", 0, "labelled")
    with pytest.raises(InputError, match="2 without a later record that has another prompt"):
        usable([none], Bytes(), MISMATCHED, LENGTH)


def test_what_cannot_be_used_is_counted_by_reason():
    good = pairs(5).documents
    bad = [
        answer("a", "x", rejected=answer("a", "x")),
        answer("a", "", rejected=answer("a", "x")),
        answer("a", "x", rejected=answer("a", "")),
        answer("a", "x" * 30, rejected=answer("a", "y" * 40)),
    ]
    corpus = Corpus("some", [*bad[:2], *good, *bad[2:]], "some", 0, "pairs")
    found = usable([corpus], Bytes(), PAIRED, LENGTH)
    np.testing.assert_array_equal(found.kept[0], np.arange(2, 7))
    assert found.describe() == (
        "left out 4 of 9 preference records: 1 longer than data.sequence_length, 2 with an empty "
        "answer, 1 with two equal answers"
    )
    assert usable([pairs(5)], Bytes(), PAIRED, LENGTH).describe() == ""
    for batches in (train([corpus], PAIRED, batch_size=1), evaluate([corpus], PAIRED)):
        samples = {int(s) for row in rows(itertools.islice(batches, 6)) for s in row["sample_ids"]}
        assert samples - {-1} == set(range(2, 7))
    with pytest.raises(InputError, match=r"'some': no record can be trained on .* left out 4 of 4"):
        usable([corpus._replace(documents=bad)], Bytes(), PAIRED, LENGTH)


@pytest.mark.parametrize(
    ("corpus", "reading", "message"),
    [
        (labelled(), PAIRED, "of the kind labelled, but dpo needs prompt, chosen and rejected$"),
        (labelled(), None, "has labelled answers, good and bad ones"),
        (pairs()._replace(kind="text"), UNPAIRED, "kind text, but bco needs .* and label$"),
    ],
)
def test_other_records_are_refused(corpus, reading, message):
    for batches in (train, evaluate):
        with pytest.raises(InputError, match=message):
            batches([corpus], reading)


def test_without_such_an_objective_a_pair_is_its_chosen_answer():
    corpus = pairs(9)
    plain = [document._replace(rejected=None) for document in corpus.documents]
    other = Corpus("plain", plain, "plain", 0)
    for how in ("concat", "best_fit"):
        found, expected = (
            evaluation_batches([c], Bytes(), batch_size=2, sequence_length=32, packing=how)
            for c in (corpus, other)
        )
        for one, two in zip(found, expected, strict=True):
            assert one.keys() == two.keys()
            for name in one:
                np.testing.assert_array_equal(one[name], two[name])


def test_lognormal_lengths_leave_less_than_a_quarter_of_padding():
    corpus = pairs(600, median=60)
    batches = itertools.islice(train([corpus], PAIRED, sequence_length=512, batch_size=8), 30)
    padding = np.mean([np.mean(batch["segment_ids"] == 0) for batch in batches])
    assert 0 < padding < 0.25


@pytest.mark.parametrize("reading", tiny.mostly_slow([PAIRED, MISMATCHED], (PAIRED,)))
def test_a_stream_goes_on_exactly_from_its_state_in_json(reading):
    corpora = [pairs(30), pairs(20, "others", seed=5)]
    options = {"mixture_weights": (1, 3), "streams": 2}
    batches = iter(train(corpora, reading, sequence_length=128, **options))
    for _ in range(5):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(5)]
    again = iter(train(corpora, reading, sequence_length=128, **options))
    again.set_state(state)
    for batch in expected:
        found = next(again)
        for name, x_BT in batch.items():
            np.testing.assert_array_equal(found[name], x_BT)
    assert any(
        not np.array_equal(expected[0][n], b[n]) for b in expected[1:] for n in ("pair_ids",)
    )


def test_processes_share_the_batches_of_one():
    corpora = [pairs(30)]
    whole = itertools.islice(train(corpora, PAIRED, streams=2), 6)
    parts = [
        itertools.islice(train(corpora, PAIRED, streams=2, process_index=i, process_count=2), 6)
        for i in range(2)
    ]
    for batch, *own in zip(whole, *parts, strict=True):
        for name, x_BT in batch.items():
            np.testing.assert_array_equal(x_BT, np.concatenate([part[name] for part in own]))


def test_an_order_has_each_pair_once_an_epoch_and_depends_on_the_seed():
    orders = []
    for seed in (0, 1):
        batches = train([pairs(40)], PAIRED, batch_size=1, shuffle_rows=1, seed=seed)
        seen = []
        for row in rows(batches):
            pieces = row["sample_ids"][row["sides"] == 1]
            seen += [int(pieces[0]), *(int(x) for x in pieces[1:][np.diff(pieces) != 0])]
            if len(seen) >= 40 * 3:
                break
        counts = np.bincount(seen, minlength=40)
        assert counts.min() >= 1
        assert counts.max() <= 5
        orders.append(seen)
    assert orders[0] != orders[1]


def test_scores_cover_both_answers_and_the_chosen_one_has_the_first(tmp_path):
    corpus = pairs(12)

    def value(sample):
        size = sum(len(encode_document(a, Bytes())) for a in corpus.documents[sample].answers)
        return np.float32(1000 * sample) + np.arange(size, dtype=np.float32)

    names, stored = ("reference_nll",), {}
    scores.write(tmp_path / "s", [corpus], "bytes", names, map(value, range(12)), {})
    stored["reference_nll"] = scores.stored(
        scores.load(tmp_path / "s"), "reference_nll", [corpus], "bytes"
    )
    for batch in itertools.islice(train([corpus], PAIRED, scores=stored), 4):
        live = batch["segment_ids"] != 0
        expected = 1000.0 * batch["sample_ids"] + batch["sample_positions"]
        np.testing.assert_array_equal(batch["reference_nll"], np.where(live, expected, 0))
    options = {"batch_size": 2, "sequence_length": 16, "packing": "concat", "shuffle_rows": 1}
    for batch in itertools.islice(
        train_batches([corpus], Bytes(), seed=0, scores=stored, **options), 4
    ):
        expected = 1000.0 * batch["sample_ids"] + batch["sample_positions"]
        np.testing.assert_array_equal(batch["reference_nll"], expected)
    changed = corpus.documents[0]._replace(rejected=answer("p0?", "another"))
    with pytest.raises(InputError, match="are those of other text"):
        stored["reference_nll"][0].read(0, changed, len(value(0)))
