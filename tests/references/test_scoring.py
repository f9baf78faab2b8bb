"""Scores of documents against each document alone in a row of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.data.alignment import spaces
from lm.data.documents import Corpus, Document
from lm.data.layout import encode_document, make_row
from lm.data.tokenizers import Bytes
from lm.errors import InputError
from lm.model.config import ModelConfig
from lm.model.interface import Tokens
from lm.model.trained import Trained
from lm.model.transformer import make_model
from lm.references.scoring import (
    make_contrast,
    make_largest,
    make_mass,
    score_across,
    score_documents,
    score_faults,
)
from lm.training.forward import make_prediction_statistics

LENGTH = 12


def model(**overrides):
    c = tiny.config(model__layers=1, model__width=16, model__heads=2).model
    c.update(overrides)
    return make_model(ModelConfig(vocab_size=257, **c))


def document(i, *spans):
    return Document(str(i), spans)


CORPORA = [
    Corpus("a", [document(i, ("x" * i, 0.0), ("yz" * (i % 4), 0.5)) for i in range(9)], "a", 0),
    Corpus(
        "b",
        [
            document(0, ("a long one, " * 5, 1.0)),
            document(1, ("", 1.0)),
            document(2, ("question", 0.0), ("answer", 1.0), ("end", 0.0)),
            document(3, ("prompt only", 0.0)),
            document(4, ("p", 0.0), ("an answer longer than a row is", 1.0)),
        ],
        "b",
        0,
    ),
]
DOCUMENTS = [one for corpus in CORPORA for one in corpus.documents]


@pytest.fixture(scope="module")
def compute():
    one = model()
    trained = Trained(tiny.params(one))
    return jax.jit(lambda batch: make_prediction_statistics(one, 64)(trained, batch).nll)


def alone(compute, positions):
    """Values of positions in windows of T, each in a row of its own."""
    values = []
    for start in range(0, len(positions), LENGTH):
        piece = positions[start : start + LENGTH]
        row = make_row([piece], LENGTH)
        values.append(np.asarray(compute({n: x[None] for n, x in row.items()}))[0, : len(piece)])
    return np.concatenate(values)


@pytest.mark.parametrize("batch_size", tiny.mostly_slow([1, 3, 16], (3,)))
def test_scores_are_those_of_each_document_alone(compute, batch_size):
    found = list(
        score_documents(compute, CORPORA, Bytes(), batch_size=batch_size, sequence_length=LENGTH)
    )
    assert len(found) == len(DOCUMENTS)
    for values, one in zip(found, DOCUMENTS, strict=True):
        positions = encode_document(one, Bytes())
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, alone(compute, positions), rtol=2e-5)


def test_without_context_the_response_is_scored_alone_and_keeps_its_places(compute):
    options = {"batch_size": 3, "sequence_length": LENGTH}
    found = list(score_documents(compute, CORPORA, Bytes(), without_context=True, **options))
    differs = 0
    for values, one in zip(found, DOCUMENTS, strict=True):
        positions = encode_document(one, Bytes())
        live = positions["weights"] != 0
        np.testing.assert_array_equal(np.isnan(values), ~live)
        if live.any():
            spans = tuple((text, weight) for text, weight in one.spans if weight)
            expected = alone(compute, encode_document(Document("", spans), Bytes()))
            np.testing.assert_allclose(values[live], expected[: live.sum()], rtol=2e-5)
            differs += not np.allclose(values[live], alone(compute, positions)[live], rtol=1e-3)
    assert differs >= 6  # Negative control: the prompt matters.


def test_faults_are_what_a_wrong_answer_has_instead(compute):
    """Pairs are found by their prompts, in whatever order; the mean is over what differs."""

    def answers(*responses):
        pairs = enumerate(responses)
        return [document(i, (f"{i}+{i}=", 0.0), (text, 1.0)) for i, text in pairs]

    right, wrong = answers("1205", "7", "42", "99"), answers("1305", "8", "4", "99")
    found = list(
        score_faults(
            compute,
            [Corpus("r", right[:2], "r", 0), Corpus("s", right[2:], "s", 0)],
            Corpus("w", wrong[::-1], "w", 0),
            Bytes(),
            batch_size=2,
            sequence_length=LENGTH,
        )
    )
    # After the prompt's four bytes: 2 for 3; 7 for 8; 2 for nothing; nothing for nothing.
    masks = ["0100" + "0", "1" + "0", "01" + "0", "00" + "0"]
    instead = [[5], [4], [4, 5], [4, 5, 6]]  # The last two: all of a wrong answer, and its end.
    for i, values in enumerate(found):
        np.testing.assert_array_equal(values[0], [0] * 4 + [int(c) for c in masks[i]])
        losses = alone(compute, encode_document(wrong[i], Bytes()))
        np.testing.assert_allclose(values[1], -losses[instead[i]].mean(), rtol=2e-5)
    assert len(found) == 4


@pytest.mark.parametrize("spans", [(("5+5=", 0.0), ("10", 1.0)), (("no prompt", 1.0),)])
def test_a_prompt_without_a_faulty_answer_is_named(spans, compute):
    corpora, faulty = [Corpus("c", [document(3, *spans)], "c", 0)], Corpus("wrong", [], "w", 0)
    with pytest.raises(InputError, match=r"^wrong has no answer to the prompt .* of document 3;"):
        next(score_faults(compute, corpora, faulty, Bytes(), batch_size=2, sequence_length=LENGTH))


@pytest.mark.parametrize("kinds", [("pairs", "text"), ("text", "labelled")])
def test_preferences_are_no_right_or_faulty_answers(kinds, compute):
    one = document(0, ("1+1=", 0.0), ("2", 1.0))
    right, wrong = (Corpus(kind, [one], kind, 0, kind) for kind in kinds)
    with pytest.raises(InputError, match=r"^(pairs|labelled) has records of the kind \1; right"):
        next(score_faults(compute, [right], wrong, Bytes(), batch_size=2, sequence_length=LENGTH))


def test_memory_holds_the_documents_of_one_batch(compute):
    """Values come before the last document is read."""
    read = []

    class Documents(list):
        def __iter__(self):
            for i, one in enumerate(super().__iter__()):
                read.append(i)
                yield one

    many = Documents(document(i, ("w" * (7 + i % 5), 1.0)) for i in range(200))
    values = score_documents(
        compute, [Corpus("c", many, "c", 0)], Bytes(), batch_size=3, sequence_length=LENGTH
    )
    next(values)
    assert len(read) < 10
    assert sum(1 for _ in values) == 199


@pytest.mark.parametrize("softcap", tiny.mostly_slow([0.0, 3.0], (3.0,)))
def test_the_contrast_is_that_of_dense_logits(softcap):
    """p_c = softmax(2 z_right - z_wrong) at the target, by NumPy in float64."""
    right, wrong = model(logit_softcap=softcap), model(width=24, logit_softcap=softcap)
    trained = [Trained(tiny.params(one, seed)) for seed, one in enumerate((right, wrong))]
    batch = tiny.batch(rows=3, length=LENGTH)
    found = jax.jit(make_contrast(right, wrong))(trained, batch)

    def logits(one, t):
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        hidden = jax.jit(one.apply)(t.params, Tokens(*inputs)).hidden
        z = np.asarray(hidden, np.float64) @ np.asarray(one.head(t.params), np.float64)
        return softcap * np.tanh(z / softcap) if softcap else z

    z = 2 * logits(right, trained[0]) - logits(wrong, trained[1])
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = np.take_along_axis(p, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert found.dtype == jnp.float32
    # Negative control: the other way round is another number.
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            jax.jit(make_contrast(wrong, right))(trained[::-1], batch), expected, rtol=0.1
        )


@pytest.mark.parametrize("softcap", tiny.mostly_slow([0.0, 3.0], (3.0,)))
def test_the_largest_are_those_of_dense_logits(softcap):
    """Ids and log-probabilities of the whole softmax, by NumPy in float64; rows above are left."""
    one = model(logit_softcap=softcap)
    trained = Trained(tiny.params(one))
    batch = tiny.batch(rows=3, length=LENGTH)
    ids, log_p = jax.jit(make_largest(one, 6, 200))(trained, batch)
    assert (ids.dtype, log_p.dtype) == (jnp.int32, jnp.float32)
    inputs = Tokens(batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden = jax.jit(one.apply)(trained.params, inputs).hidden
    z = np.asarray(hidden, np.float64) @ np.asarray(one.head(trained.params), np.float64)
    z = softcap * np.tanh(z / softcap) if softcap else z
    expected = z - np.log(np.exp(z).sum(-1, keepdims=True))
    best = np.argsort(-expected[..., :200], -1)[..., :6]
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_allclose(log_p, np.take_along_axis(expected, best, -1), rtol=2e-5)
    assert (np.argsort(-expected, -1)[..., :6] >= 200).any()  # Negative control.


def test_several_values_keep_their_places_and_miss_where_nothing_is_scored():
    def compute(batch):
        targets = np.asarray(batch["targets"])
        return np.stack([targets, targets + 1000], -1), np.float32(targets)

    options = {"batch_size": 3, "sequence_length": LENGTH}
    missing = 0
    for without in (False, True):
        found = score_documents(compute, CORPORA, Bytes(), without_context=without, **options)
        for (ids, values), one in zip(found, DOCUMENTS, strict=True):
            positions = encode_document(one, Bytes())
            live = (positions["weights"] != 0) | (not without)
            np.testing.assert_array_equal(ids[live, 1], positions["targets"][live] + 1000)
            np.testing.assert_array_equal(values[live], positions["targets"][live])
            assert (ids[~live] == -1).all()
            assert np.isnan(values[~live]).all()
            missing += (~live).sum()
    assert missing > 10


class Pairs(Bytes):
    """A tokenizer of two bytes a token; a last byte that is alone is one of its own."""

    vocab_size, end_of_text, beginning_of_text = 2**17, 2**17 - 1, 2**17 - 1

    def encode(self, text):
        content = text.encode()
        pieces = [content[i : i + 2] for i in range(0, len(content), 2)]
        ids = [int.from_bytes(piece) + 2**16 * (len(piece) == 1) for piece in pieces]
        return np.asarray(ids, np.int32), np.asarray([len(x) for x in pieces], np.int32)


def test_a_teacher_of_other_tokens_is_summed_over_common_pieces():
    """The student reads pairs of bytes and the teacher bytes, whose values are their numbers."""
    options = {"batch_size": 3, "sequence_length": LENGTH}
    corpora = [CORPORA[0], CORPORA[1]]

    def compute(batch):
        return np.float32(batch["targets"])

    found = score_across(compute, corpora, Pairs(), Bytes(), chunks=True, **options)
    for (values,), one in zip(found, DOCUMENTS, strict=True):
        expected = []
        for text, _ in one.spans:
            content = text.encode()
            expected += [sum(content[i : i + 2]) for i in range(0, len(content), 2)]
        np.testing.assert_array_equal(values, [*expected, Bytes.end_of_text])

    # The other way round, every second byte ends a piece; here what is read before each.
    def twice(batch):
        return np.stack([batch["tokens"], batch["targets"]], -1).astype(np.float32)

    found = score_across(twice, corpora, Bytes(), Pairs(), chunks=False, **options)
    for (values,), one in zip(found, DOCUMENTS, strict=True):
        teacher = encode_document(one, Pairs())
        starts = np.cumsum(np.append(0, teacher["num_bytes"][:-1]))
        np.testing.assert_array_equal(np.flatnonzero(~np.isnan(values[:, 0])), starts)
        np.testing.assert_array_equal(values[starts, 1], teacher["targets"])


def test_a_chat_is_no_common_text(compute):
    chat = Document("talk", (("hello", 0.0), ("hi", 1.0)), roles=("user", "assistant"))
    found = score_across(
        compute,
        [Corpus("c", [chat], "c", 0)],
        Bytes(),
        Bytes(),
        batch_size=2,
        sequence_length=LENGTH,
        chunks=True,
    )
    with pytest.raises(InputError, match=r"^talk is a chat, which every tokenizer writes"):
        next(found)


def test_pieces_go_on_where_no_space_is_likely():
    """The teacher is sure of a space after an even byte; the end of text ends all."""

    def compute(batch):
        after_even = np.asarray(batch["tokens"]) % 2 == 0
        return np.float32(batch["targets"]), np.where(after_even, 0.3, 0.2).astype(np.float32)

    def pieces(merge):
        options = {"batch_size": 3, "sequence_length": 64, "chunks": True, "merge": merge}
        found = score_across(compute, CORPORA, Bytes(), Bytes(), **options)
        return [values for (values,) in found]

    for merge, even in ((0.1, False), (0.25, True)):
        for values, one in zip(pieces(merge), DOCUMENTS, strict=True):
            targets = encode_document(one, Bytes())["targets"]
            ends = (targets % 2 == 0) | (not even)
            np.testing.assert_array_equal(~np.isnan(values), ends)
            sums = np.diff(np.cumsum(targets)[ends], prepend=0)
            np.testing.assert_array_equal(values[ends], sums)


def test_the_mass_of_spaces_is_that_of_dense_logits():
    one = model()
    trained = Trained(tiny.params(one))
    batch = tiny.batch(rows=3, length=LENGTH)
    chosen = spaces(Bytes())
    assert np.flatnonzero(chosen).tolist() == [9, 10, 32, 256]
    found = jax.jit(make_mass(one, chosen))(trained, batch)
    inputs = Tokens(batch["tokens"], batch["positions"], batch["segment_ids"])
    hidden = jax.jit(one.apply)(trained.params, inputs).hidden
    p = np.exp(np.asarray(hidden, np.float64) @ np.asarray(one.head(trained.params), np.float64))
    np.testing.assert_allclose(found, p[..., chosen].sum(-1) / p.sum(-1), rtol=1e-5)
