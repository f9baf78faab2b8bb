"""Batches: their orders, streams, states and mixtures, and those of an evaluation."""

import itertools
import json
from collections import Counter

import grain
import numpy as np
import pytest
import tiny
from absl import flags
from made_rows import (
    TYPES,
    assert_rows_are_sound,
    corpus_of,
    expected_targets,
    letter_documents,
    rows_of,
    targets_of,
    training_batches,
)

from lm.data import packing
from lm.data.batches import check_enough, evaluation_batches
from lm.data.documents import Corpus, Document
from lm.data.layout import BATCH, POSITION
from lm.data.tokenizers import Bytes
from lm.errors import InputError


def test_an_epoch_has_every_position_once_and_epochs_differ():
    documents = letter_documents(24)
    corpus = corpus_of(documents)
    expected = expected_targets(corpus.documents)
    size = sum(expected.values())
    batches = training_batches([corpus], batch_size=1, sequence_length=size, shuffle_rows=1)
    rows = list(itertools.islice(rows_of(batches), 3))
    for row in rows:  # A row is an epoch long.
        assert targets_of([row]) == expected
    orders = [tuple(row["tokens"].tolist()) for row in rows]
    assert len(set(orders)) == 3


def _ids_of_text(corpora):
    """Text of a document -> its index, counted through all corpora."""
    documents = [document for corpus in corpora for document in corpus.documents]
    ids = {document.text: i for i, document in enumerate(documents)}
    assert len(ids) == len(documents)
    return ids


@pytest.mark.parametrize("mode", tiny.mostly_slow(["concat", "best_fit"], ("concat",)))
@pytest.mark.parametrize("processes", tiny.mostly_slow([1, 3], (3,)))
def test_a_sample_id_is_its_document_in_every_epoch_mixture_packing_and_process(mode, processes):
    first = [f"<{i}:" + "a" * (i % 7) + ">" for i in range(60)]
    second = [f"<other {i}:" + "b" * (3 * i % 11) + ">" for i in range(30)]
    corpora = [corpus_of(first), corpus_of(second, "other")]
    ids = _ids_of_text(corpora)
    options = {"packing": mode, "process_count": processes, "batch_size": 6, "sequence_length": 24}
    for weights in ((), (1, 3)):
        seen = Counter()
        for index in range(processes):
            batches = training_batches(
                corpora, mixture_weights=weights, process_index=index, **options
            )
            for row in itertools.islice(rows_of(batches), 480 // processes):
                for segment in range(1, row["segment_ids"].max() + 1):
                    where = row["segment_ids"] == segment
                    (sample,) = set(row["sample_ids"][where].tolist())
                    text = bytes(t for t in row["targets"][where].tolist() if t < 256).decode()
                    if text.endswith(">") and text.startswith("<"):
                        assert ids[text] == sample
                    else:  # A piece of a document that was cut.
                        assert any(text in whole for whole, i in ids.items() if i == sample)
                    seen[sample] += 1
        assert set(seen) == set(range(90))
        assert min(seen.values()) >= 2  # More than an epoch.


def test_evaluation_has_sample_ids_too():
    corpora = [corpus_of(["abc", "de"]), corpus_of(["f"], "other")]
    (batch,) = evaluation_batches(corpora, Bytes(), batch_size=2, sequence_length=8)
    assert batch["sample_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [2] + [-1] * 7]
    assert {name: array.dtype for name, array in batch.items()} == BATCH


def test_rows_of_one_document_are_spread_over_the_window():
    corpus = corpus_of(["a" * 4000, "b" * 4000])
    first = next(
        iter(training_batches([corpus], batch_size=64, sequence_length=32, shuffle_rows=256))
    )
    assert len(set(first["tokens"].max(axis=1)) & {97, 98, 256}) > 1
    plain = next(
        iter(training_batches([corpus], batch_size=64, sequence_length=32, shuffle_rows=1))
    )
    assert len({row for row in plain["targets"].max(axis=1).tolist() if row < 256}) == 1


def test_seeds_give_other_orders_and_the_same_seed_the_same():
    corpus = corpus_of(letter_documents(60))
    first, again, other = (
        [b["tokens"].tolist() for b in itertools.islice(training_batches([corpus], seed=seed), 20)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    # Nor is the other seed's first epoch this one's second: Grain adds the epoch to the seed.
    size = sum(expected_targets(corpus.documents).values())
    long = {"batch_size": 1, "sequence_length": size, "shuffle_rows": 1}
    epochs = [
        [
            row["tokens"].tolist()
            for row in itertools.islice(rows_of(training_batches([corpus], seed=s, **long)), 3)
        ]
        for s in (0, 1)
    ]
    assert not [row for row in epochs[0] if row in epochs[1]]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_documents(count):
    corpus = corpus_of([chr(33 + i) * 15 for i in range(12)])  # Each fills one row.
    parts = []
    for index in range(count):
        batches = training_batches(
            [corpus],
            batch_size=count,
            shuffle_rows=1,
            process_index=index,
            process_count=count,
        )
        epoch = itertools.islice(rows_of(batches), 12 // count)
        parts.append(sorted(int(row["targets"][0]) for row in epoch))
    assert sorted(itertools.chain(*parts)) == [33 + i for i in range(12)]
    assert all(len(part) == 12 // count for part in parts)


@pytest.mark.parametrize("mode", tiny.mostly_slow(["concat", "best_fit"], ("best_fit",)))
@pytest.mark.parametrize("mixed", tiny.mostly_slow([False, True], (True,)))
def test_a_state_that_went_through_json_restores_the_stream(mode, mixed):
    # Documents of one row's length too: a row that ends with its document is where Grain's own
    # packer loses one.
    corpora = [corpus_of(letter_documents(30) + ["x" * 15] * 10)]
    if mixed:
        corpora.append(corpus_of(letter_documents(10, seed=1), "other"))
    dataset = training_batches(corpora, packing=mode, shuffle_rows=6)
    iterator = iter(dataset)
    states, batches = [], []
    for _ in range(14):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for point in (0, 1, 2, 3, 7, 13):
        restored = iter(dataset)
        restored.set_state(json.loads(states[point]))
        for batch in batches[point:]:
            np.testing.assert_equal(next(restored), batch)
    iterator.set_state(json.loads(states[4]))  # One that has run already, too.
    np.testing.assert_equal(next(iterator), batches[4])


def test_the_packers_own_state_restores_at_every_row():
    documents = [np.zeros(size, POSITION) for size in (4, 4, 1, 7, 8, 3, 12, 4, 4)]
    for i, document in enumerate(documents):
        document["tokens"] = i
        document["targets"] = np.arange(len(document))
    dataset = packing.pack(grain.MapDataset.source(documents).to_iter_dataset(), "concat", 4)
    rows = list(dataset)
    iterator = iter(dataset)
    for i in range(len(rows)):
        restored = iter(dataset)
        restored.set_state(json.loads(json.dumps(iterator.get_state())))
        np.testing.assert_equal(list(restored), rows[i:])
        next(iterator)
    restored.set_state(json.loads(json.dumps(iterator.get_state())))
    assert list(restored) == []


def test_the_same_streams_are_the_same_batches_on_any_number_of_processes():
    """And what one number of processes has saved, another goes on from."""
    corpora = [corpus_of(letter_documents(40)), corpus_of(letter_documents(12, seed=1), "other")]

    def start(count):
        options = {"streams": 4, "batch_size": 8, "shuffle_rows": 3, "process_count": count}
        return [iter(training_batches(corpora, process_index=i, **options)) for i in range(count)]

    def take(iterators, batches):
        for _ in range(batches):
            parts = [next(iterator) for iterator in iterators]
            yield {name: np.concatenate([part[name] for part in parts]) for name in TYPES}

    def stop(iterators):
        for iterator in iterators:
            iterator.close()

    one = start(1)
    whole = list(take(one, 7))
    stop(one)
    assert whole[0]["tokens"].shape == (8, 16)
    for before, after in ((2, 4), (4, 1)):
        first = start(before)
        np.testing.assert_equal(list(take(first, 3)), whole[:3])
        states = json.loads(json.dumps([iterator.get_state() for iterator in first]))
        stop(first)
        merged = {k: v for state in states for k, v in state["streams"].items()}
        assert sorted(merged) == ["0", "1", "2", "3"]
        second = start(after)
        for iterator in second:
            iterator.set_state({"streams": merged})
        np.testing.assert_equal(list(take(second, 4)), whole[3:])
        stop(second)
    # Negative control: other streams are other batches.
    other = iter(training_batches(corpora, streams=2, batch_size=8, shuffle_rows=3))
    assert not np.array_equal(next(other)["tokens"], whole[0]["tokens"])
    other.close()


def test_mixtures_follow_their_weights():
    corpora = [corpus_of(["a" * 7] * 30, "a"), corpus_of(["b" * 7] * 10, "b")]

    def share(**changes):
        batches = training_batches(corpora, sequence_length=8, **changes)
        tokens = np.stack([b["targets"] for b in itertools.islice(batches, 40)])
        return np.mean(tokens == 97) / np.mean((tokens == 97) | (tokens == 98))

    assert share() == pytest.approx(0.75, abs=0.03)
    assert share(mixture_weights=(1, 1)) == pytest.approx(0.5, abs=0.03)
    assert share(mixture_weights=(0.1, 0.9)) == pytest.approx(0.1, abs=0.03)


@pytest.mark.slow
def test_worker_processes():
    flags.FLAGS.mark_as_parsed()  # As they are in any absl program; Grain's workers read theirs.
    corpus = corpus_of(letter_documents(40))
    dataset = training_batches([corpus], workers=2, shuffle_rows=4)
    iterator = iter(dataset)
    batches, states = [], []
    for _ in range(8):
        batches.append(next(iterator))
        states.append(json.dumps(iterator.get_state()))
        assert_rows_are_sound(batches[-1])
    iterator.close()
    assert len({batch["tokens"].tobytes() for batch in batches}) == 8
    restored = iter(dataset)
    restored.set_state(json.loads(states[3]))
    for batch in batches[4:]:
        np.testing.assert_equal(next(restored), batch)
    restored.close()


@pytest.mark.parametrize("mode", ["concat", "best_fit"])
def test_evaluation_has_every_target_once_for_any_number_of_processes(mode):
    corpora = [corpus_of(letter_documents(30)), corpus_of([(("p", 0.0), ("r", 1.0))] * 7)]

    def batches(index=0, count=1):
        dataset = evaluation_batches(
            corpora,
            Bytes(),
            batch_size=12,
            sequence_length=16,
            packing=mode,
            process_index=index,
            process_count=count,
        )
        return list(dataset)

    whole = batches()
    for batch in whole:
        assert_rows_are_sound(batch)
        assert batch["tokens"].shape == (12, 16)
    expected = expected_targets([d for corpus in corpora for d in corpus.documents])
    assert targets_of(rows_of(whole)) == expected
    np.testing.assert_equal(batches(), whole)
    for count in (2, 3, 12):
        parts = [batches(index, count) for index in range(count)]
        assert {len(part) for part in parts} == {len(whole)}
        for together, *shares in zip(whole, *parts, strict=True):
            for name in TYPES:
                np.testing.assert_array_equal(
                    together[name], np.concatenate([share[name] for share in shares])
                )


def test_evaluation_of_less_than_a_batch():
    dataset = evaluation_batches([corpus_of(["ab"])], Bytes(), batch_size=4, sequence_length=2)
    (batch,) = dataset
    assert batch["weights"].tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]


def test_a_corpus_must_fill_a_batch():
    corpus = corpus_of(["a" * 9, "b" * 9])  # Twenty targets.
    check_enough([corpus], Bytes(), batch_size=2, sequence_length=10)
    message = r"data\.corpus.*has 20 tokens.*train\.batch_size 3 x data\.sequence_length 7 = 21"
    with pytest.raises(InputError, match=message):
        check_enough([corpus], Bytes(), batch_size=3, sequence_length=7)
    with pytest.raises(InputError, match=message):
        training_batches([corpus], batch_size=3, sequence_length=7)


def test_a_large_corpus_is_not_read_to_see_that_it_is_large():
    class Endless:
        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            assert index < 3
            return Document(str(index), (("a" * 40, 1.0),))

    corpus = Corpus("endless", Endless(), "", 0)
    check_enough([corpus], Bytes(), batch_size=4, sequence_length=30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "concatenate"}, r"data\.packing must be concat or best_fit"),
        ({"shuffle_rows": 0}, r"data\.shuffle_rows must be at least 1"),
        ({"workers": -1}, r"data\.workers must be at least 0"),
        ({"sequence_length": 0}, r"data\.sequence_length must be at least 1"),
        ({"seed": -1}, r"train\.seed must be at least 0"),
        ({"mixture_weights": (1, 2)}, r"data\.mixture_weights must be 1 positive numbers"),
        ({"mixture_weights": (0,)}, r"data\.mixture_weights must be 1 positive numbers"),
        ({"process_count": 3}, r"train\.batch_size must be a multiple of the 3 processes"),
        ({"streams": 3}, r"data\.streams must be a multiple of the 1 processes and divide"),
        ({"streams": 3, "process_count": 2}, r"data\.streams must be a multiple of the 2 proc"),
        ({"process_count": 50, "batch_size": 50}, r"data\.corpus 'fake'.*40 training documents"),
    ],
)
def test_impossible_arguments_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        training_batches([corpus_of(letter_documents(40))], **changes)
