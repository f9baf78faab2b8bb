import itertools
import json
from collections import Counter

import grain
import numpy as np
import pytest
import tiny
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import packing
from lm.data.batches import check_enough, evaluation_batches, train_batches
from lm.data.documents import Corpus, Document
from lm.data.layout import BATCH, POSITION, add_fields, encode_document, make_row
from lm.data.tokenizers import Bytes
from lm.errors import InputError

_TYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "num_bytes": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "sample_ids": np.int32,
    "sample_positions": np.int32,
}


def _corpus(documents, name="fake"):
    documents = [
        Document(str(i), document if isinstance(document, tuple) else ((document, 1.0),))
        for i, document in enumerate(documents)
    ]
    return Corpus(name, documents, name, 0)


def _letters(count, seed=0):
    """Documents that differ in their first byte, of 0 to 50 bytes."""
    rng = np.random.default_rng(seed)
    return [chr(i % 90 + 33) + "abcdefg" * rng.integers(0, 8) for i in range(count)]


def _train(corpora, **changes):
    arguments = {
        "batch_size": 4,
        "sequence_length": 16,
        "packing": "concat",
        "seed": 0,
        "shuffle_rows": 1,
    }
    return train_batches(corpora, Bytes(), **(arguments | changes))


def _rows(batches):
    for batch in batches:
        for i in range(len(batch["tokens"])):
            yield {name: x_BT[i] for name, x_BT in batch.items()}


def _segments(rows):
    """The pieces of documents in rows, each as (tokens, targets, weights, num_bytes)."""
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            where = row["segment_ids"] == segment
            yield tuple(
                tuple(row[name][where].tolist())
                for name in ("tokens", "targets", "weights", "num_bytes")
            )


def _targets(rows):
    """Every (token, target, weight, bytes) that is not padding, with how often it occurs."""
    return Counter(
        position for segment in _segments(rows) for position in zip(*segment, strict=True)
    )


def _expected_targets(documents):
    encoded = [encode_document(document, Bytes()) for document in documents]
    return Counter(tuple(position.tolist()) for document in encoded for position in document)


def _assert_rows_are_sound(batch):
    """What attention and the loss rely on."""
    assert {name: x_BT.dtype for name, x_BT in batch.items()} == _TYPES
    padding_BT = batch["segment_ids"] == 0
    for name in _TYPES:
        np.testing.assert_array_equal(batch[name][padding_BT], -1 if name == "sample_ids" else 0)
    steps = np.diff(batch["segment_ids"], axis=1)
    ends = np.diff(padding_BT.astype(int), axis=1)
    assert (ends >= 0).all()  # Padding comes last.
    assert np.isin(steps[~padding_BT[:, 1:]], (0, 1)).all()  # Segments count up, without gaps.
    assert np.isin(batch["segment_ids"][:, 0], (0, 1)).all()
    inside = (steps == 0) & ~padding_BT[:, 1:]
    np.testing.assert_array_equal(batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside])
    np.testing.assert_array_equal(
        batch["positions"][:, 1:][inside], batch["positions"][:, :-1][inside] + 1
    )
    np.testing.assert_array_equal(
        batch["sample_ids"][:, 1:][inside], batch["sample_ids"][:, :-1][inside]
    )
    assert not batch["positions"][:, 1:][~inside].any()
    assert not batch["positions"][:, 0].any()


def test_layout_of_a_prompt_and_its_response():
    document = Document("d", (("ab", 0.0), ("é", 1.0)))
    positions = encode_document(document, Bytes())
    assert positions["tokens"].tolist() == [256, 97, 98, 195, 169]
    assert positions["targets"].tolist() == [97, 98, 195, 169, 256]
    assert positions["weights"].tolist() == [0, 0, 1, 1, 1]
    assert positions["num_bytes"].tolist() == [1, 1, 1, 1, 0]


def test_layout_of_an_empty_document():
    positions = encode_document(Document("d", (("", 1.0),)), Bytes())
    assert positions.tolist() == [(256, 256, 1.0, 0)]


def test_ids_outside_the_vocabulary_are_refused():
    class Wrong(Bytes):
        vocab_size = 98

    with pytest.raises(
        InputError, match=r"data\.tokenizer: gives ids from 97 to 99 for document d"
    ):
        encode_document(Document("d", (("abc", 1.0),)), Wrong())
    with pytest.raises(InputError, match=r"data\.tokenizer"):
        list(evaluation_batches([_corpus(["abc"])], Wrong(), batch_size=1, sequence_length=8))


def test_a_row_of_no_pieces_is_padding():
    assert not any(array.any() for array in make_row([], 4).values())
    row = make_row([add_fields(np.zeros(1, POSITION), sample_ids=np.int32(7))], 3)
    assert row["sample_ids"].tolist() == [7, -1, -1]


@pytest.mark.parametrize("mode", tiny.mostly_slow(["concat", "best_fit"], ("best_fit",)))
@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    length=st.integers(1, 17),
    open_rows=st.sampled_from([1, 3, 128]),
)
def test_packing_loses_and_repeats_nothing(mode, lengths, length, open_rows):
    documents = []
    for i, size in enumerate(lengths):
        document = np.zeros(size, POSITION)
        document["tokens"] = i
        document["targets"] = np.arange(size)
        document["weights"] = 0.5
        documents.append(document)
    source = grain.MapDataset.source(documents).to_iter_dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_OPEN_ROWS", open_rows)
        rows = list(packing.pack(source, mode, length))
    found = _targets(rows)
    assert found == Counter(
        (i, offset, 0.5, 0) for i, size in enumerate(lengths) for offset in range(size)
    )
    if mode == "concat":
        filled = [np.count_nonzero(row["segment_ids"]) for row in rows]
        assert filled[:-1] == [length] * (len(rows) - 1)
    else:
        pieces = sum(-(-size // length) for size in lengths)  # Whole where they fit.
        assert len(list(_segments(rows))) == pieces


@pytest.mark.parametrize("mode", ["concat", "best_fit"])
@pytest.mark.parametrize("length", [1, 16, 64])
def test_rows_of_batches_are_sound(mode, length):
    corpus = _corpus([*_letters(40), (("prompt", 0.0), ("answer", 1.0))])
    batches = iter(_train([corpus], packing=mode, sequence_length=length))
    for batch in itertools.islice(batches, 30):
        assert batch["tokens"].shape == (4, length)
        _assert_rows_are_sound(batch)


def test_soundness_is_not_a_matter_of_course():
    batch = next(iter(_train([_corpus(_letters(40))])))
    for name in ("targets", "positions", "segment_ids"):
        broken = batch | {name: np.roll(batch[name], 1, axis=1)}
        with pytest.raises(AssertionError):
            _assert_rows_are_sound(broken)


def test_only_prompts_and_padding_weigh_nothing():
    corpus = _corpus([(("??????", 0.0), ("!!!!", 1.0))] * 20)
    batches = evaluation_batches([corpus], Bytes(), batch_size=4, sequence_length=16)
    for row in _rows(batches):
        prompt = row["targets"] == ord("?")
        padding = row["segment_ids"] == 0
        np.testing.assert_array_equal(row["weights"] == 0, prompt | padding)


def test_an_epoch_has_every_position_once_and_epochs_differ():
    documents = _letters(24)
    corpus = _corpus(documents)
    expected = _expected_targets(corpus.documents)
    size = sum(expected.values())
    batches = _train([corpus], batch_size=1, sequence_length=size, shuffle_rows=1)
    rows = list(itertools.islice(_rows(batches), 3))
    for row in rows:  # A row is an epoch long.
        assert _targets([row]) == expected
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
    corpora = [_corpus(first), _corpus(second, "other")]
    ids = _ids_of_text(corpora)
    options = {"packing": mode, "process_count": processes, "batch_size": 6, "sequence_length": 24}
    for weights in ((), (1, 3)):
        seen = Counter()
        for index in range(processes):
            batches = _train(corpora, mixture_weights=weights, process_index=index, **options)
            for row in itertools.islice(_rows(batches), 480 // processes):
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
    corpora = [_corpus(["abc", "de"]), _corpus(["f"], "other")]
    (batch,) = evaluation_batches(corpora, Bytes(), batch_size=2, sequence_length=8)
    assert batch["sample_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [2] + [-1] * 7]
    assert {name: array.dtype for name, array in batch.items()} == BATCH


def test_rows_of_one_document_are_spread_over_the_window():
    corpus = _corpus(["a" * 4000, "b" * 4000])
    first = next(iter(_train([corpus], batch_size=64, sequence_length=32, shuffle_rows=256)))
    assert len(set(first["tokens"].max(axis=1)) & {97, 98, 256}) > 1
    plain = next(iter(_train([corpus], batch_size=64, sequence_length=32, shuffle_rows=1)))
    assert len({row for row in plain["targets"].max(axis=1).tolist() if row < 256}) == 1


def test_seeds_give_other_orders_and_the_same_seed_the_same():
    corpus = _corpus(_letters(60))
    first, again, other = (
        [b["tokens"].tolist() for b in itertools.islice(_train([corpus], seed=seed), 20)]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    # Nor is the other seed's first epoch this one's second: Grain adds the epoch to the seed.
    size = sum(_expected_targets(corpus.documents).values())
    long = {"batch_size": 1, "sequence_length": size, "shuffle_rows": 1}
    epochs = [
        [
            row["tokens"].tolist()
            for row in itertools.islice(_rows(_train([corpus], seed=s, **long)), 3)
        ]
        for s in (0, 1)
    ]
    assert not [row for row in epochs[0] if row in epochs[1]]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_documents(count):
    corpus = _corpus([chr(33 + i) * 15 for i in range(12)])  # Each fills one row.
    parts = []
    for index in range(count):
        batches = _train(
            [corpus],
            batch_size=count,
            shuffle_rows=1,
            process_index=index,
            process_count=count,
        )
        epoch = itertools.islice(_rows(batches), 12 // count)
        parts.append(sorted(int(row["targets"][0]) for row in epoch))
    assert sorted(itertools.chain(*parts)) == [33 + i for i in range(12)]
    assert all(len(part) == 12 // count for part in parts)


@pytest.mark.parametrize("mode", tiny.mostly_slow(["concat", "best_fit"], ("best_fit",)))
@pytest.mark.parametrize("mixed", tiny.mostly_slow([False, True], (True,)))
def test_a_state_that_went_through_json_restores_the_stream(mode, mixed):
    # Documents of one row's length too: a row that ends with its document is where Grain's own
    # packer loses one.
    corpora = [_corpus(_letters(30) + ["x" * 15] * 10)]
    if mixed:
        corpora.append(_corpus(_letters(10, seed=1), "other"))
    dataset = _train(corpora, packing=mode, shuffle_rows=6)
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
    corpora = [_corpus(_letters(40)), _corpus(_letters(12, seed=1), "other")]

    def start(count):
        options = {"streams": 4, "batch_size": 8, "shuffle_rows": 3, "process_count": count}
        return [iter(_train(corpora, process_index=i, **options)) for i in range(count)]

    def take(iterators, batches):
        for _ in range(batches):
            parts = [next(iterator) for iterator in iterators]
            yield {name: np.concatenate([part[name] for part in parts]) for name in _TYPES}

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
    other = iter(_train(corpora, streams=2, batch_size=8, shuffle_rows=3))
    assert not np.array_equal(next(other)["tokens"], whole[0]["tokens"])
    other.close()


def test_mixtures_follow_their_weights():
    corpora = [_corpus(["a" * 7] * 30, "a"), _corpus(["b" * 7] * 10, "b")]

    def share(**changes):
        batches = _train(corpora, sequence_length=8, **changes)
        tokens = np.stack([b["targets"] for b in itertools.islice(batches, 40)])
        return np.mean(tokens == 97) / np.mean((tokens == 97) | (tokens == 98))

    assert share() == pytest.approx(0.75, abs=0.03)
    assert share(mixture_weights=(1, 1)) == pytest.approx(0.5, abs=0.03)
    assert share(mixture_weights=(0.1, 0.9)) == pytest.approx(0.1, abs=0.03)


@pytest.mark.slow
def test_worker_processes():
    flags.FLAGS.mark_as_parsed()  # As they are in any absl program; Grain's workers read theirs.
    corpus = _corpus(_letters(40))
    dataset = _train([corpus], workers=2, shuffle_rows=4)
    iterator = iter(dataset)
    batches, states = [], []
    for _ in range(8):
        batches.append(next(iterator))
        states.append(json.dumps(iterator.get_state()))
        _assert_rows_are_sound(batches[-1])
    iterator.close()
    assert len({batch["tokens"].tobytes() for batch in batches}) == 8
    restored = iter(dataset)
    restored.set_state(json.loads(states[3]))
    for batch in batches[4:]:
        np.testing.assert_equal(next(restored), batch)
    restored.close()


@pytest.mark.parametrize("mode", ["concat", "best_fit"])
def test_evaluation_has_every_target_once_for_any_number_of_processes(mode):
    corpora = [_corpus(_letters(30)), _corpus([(("p", 0.0), ("r", 1.0))] * 7)]

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
        _assert_rows_are_sound(batch)
        assert batch["tokens"].shape == (12, 16)
    expected = _expected_targets([d for corpus in corpora for d in corpus.documents])
    assert _targets(_rows(whole)) == expected
    np.testing.assert_equal(batches(), whole)
    for count in (2, 3, 12):
        parts = [batches(index, count) for index in range(count)]
        assert {len(part) for part in parts} == {len(whole)}
        for together, *shares in zip(whole, *parts, strict=True):
            for name in _TYPES:
                np.testing.assert_array_equal(
                    together[name], np.concatenate([share[name] for share in shares])
                )


def test_evaluation_of_less_than_a_batch():
    dataset = evaluation_batches([_corpus(["ab"])], Bytes(), batch_size=4, sequence_length=2)
    (batch,) = dataset
    assert batch["weights"].tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]


def test_a_corpus_must_fill_a_batch():
    corpus = _corpus(["a" * 9, "b" * 9])  # Twenty targets.
    check_enough([corpus], Bytes(), batch_size=2, sequence_length=10)
    message = r"data\.corpus.*has 20 tokens.*train\.batch_size 3 x data\.sequence_length 7 = 21"
    with pytest.raises(InputError, match=message):
        check_enough([corpus], Bytes(), batch_size=3, sequence_length=7)
    with pytest.raises(InputError, match=message):
        _train([corpus], batch_size=3, sequence_length=7)


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
        _train([_corpus(_letters(40))], **changes)
