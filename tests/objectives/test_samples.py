"""A sample is a document: packing, also across the end of a row, changes no weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import weightings
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.cross_entropy import TokenStatistics
from objectives.weighting import WEIGHTINGS, normalise, uniform
from objectives.weighting.samples import find_samples, sample_means, spread

FIRST = jnp.zeros((), jnp.int32)
# Documents are at most 12 long, together at most 40; rows of 8 leave room for padding.
PACKED, ALONE = (8, 8), (12, 12)
BY_SAMPLE = [
    name
    for name in weightings.METHODS
    if "sample_ids" in WEIGHTINGS[name](**weightings.METHODS[name][0]).batch_keys
]
INTEGERS = ("sample_ids", "sample_positions", "segment_ids")
FILL = {"weights": 0.0, "sample_ids": -1}


def test_these_methods_speak_of_samples():
    speak = {"ss_token", "prior", "fait", "block_sensitive", "dynamic", "glow", "q_tuning"}
    assert set(BY_SAMPLE) == speak
    assert "sample_positions" in WEIGHTINGS["q_tuning"]().batch_keys
    assert normalise(uniform(), "sequence").batch_keys == ("sample_ids",)


def make(name):
    if name == "sequence":
        return normalise(WEIGHTINGS["dft"](), "sequence")
    if name == "ss_token of labels":
        return WEIGHTINGS["ss_token"]()
    hyper = {"attention_row": "predictor"} if name == "ss_token" else {}
    return WEIGHTINGS[name](**weightings.METHODS[name][0], **hyper)


def draw_document(rng, sample, length):
    """Token arrays; losses are multiples of 1/8, so that sums do not depend on their order."""

    def eighths(low, high):
        return rng.integers(8 * low, 8 * high, length) / 8

    losses = ("nll", "entropy", "history_nll", "prior_nll", "full_nll", "faulty_log_probability")
    return {name: eighths(1, 4) for name in losses} | {
        "weights": rng.choice([0.0, 0.5, 1.0, 2.0], length),
        "sample_ids": np.full(length, sample),
        "segment_ids": np.ones(length),
        "sample_positions": np.arange(length),
        "error_mask": rng.integers(0, 2, length),
        "attention_to": eighths(0, 1),
    }


def lay_out(pieces_of_rows, shape):
    """Arrays of `shape`: each row is a list of pieces, then padding that holds NaN."""
    names = pieces_of_rows[0][0]
    arrays = {name: np.full(shape, FILL.get(name, np.nan)) for name in names}
    for row, pieces in enumerate(pieces_of_rows):
        start = 0
        for number, piece in enumerate(pieces, 1):
            end = start + len(piece["nll"])
            for name, values in piece.items():
                arrays[name][row, start:end] = values
            arrays["segment_ids"][row, start:end] = number
            start = end
    return arrays


def cut_and_pack(rng, documents, whole):
    """Rows of pieces in random order: the stream of documents cut at row ends, or whole ones."""
    rows, room = [[]], PACKED[1]
    for document in documents:
        length = len(document["nll"])
        start = 0
        while start < length:
            if not room or (whole and room < length):
                rows, room = [*rows, []], PACKED[1]
            end = min(length, start + room)
            rows[-1].append({name: x[start:end] for name, x in document.items()})
            start, room = end, room - (end - start)
    return [rows[i] for i in rng.permutation(len(rows))]


@functools.cache
def weigh(name):
    weighting = make(name)

    @jax.jit
    def run(arrays):
        names = ("weights", "sample_ids", "sample_positions", "segment_ids")
        b = {name: arrays[name] for name in names}
        nll = arrays["nll"]
        stats = TokenStatistics(nll, jnp.zeros_like(nll), arrays["entropy"], -nll)
        return weighting.weigh(stats, b, arrays, weightings.state(weighting), FIRST)

    return run


def weights_by_token(name, arrays, true_ids=None):
    """(document, position) -> weight, of all targets."""
    given = {
        key: np.nan_to_num(x).astype(np.int32) if key in INTEGERS else x.astype(np.float32)
        for key, x in arrays.items()
    }
    weights, *rest = weigh(name)(given)
    true_ids = arrays["sample_ids"] if true_ids is None else true_ids
    live = arrays["weights"] != 0
    assert not np.asarray(weights)[~live].any()
    keys = zip(true_ids[live], arrays["sample_positions"][live], strict=True)
    found = dict(zip(keys, np.asarray(weights)[live].tolist(), strict=True))
    return dict(sorted(found.items())), rest


def same(a, b):
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    tiny.mostly_slow(
        [*BY_SAMPLE, "sequence", "ss_token of labels"], ("sequence", "glow", "ss_token", "fait")
    ),
)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=7).filter(lambda x: sum(x) <= 40),
    whole=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_packed_and_alone_give_every_token_the_same_weight(name, lengths, whole, seed):
    rng = np.random.default_rng(seed)
    # The attention of a label stands in the next slot, which after a cut is that of the predictor.
    whole |= name == "ss_token of labels"
    if whole:
        lengths = [min(length, PACKED[1]) for length in lengths]
    ids = rng.permutation(weightings.SAMPLES)
    documents = [draw_document(rng, ids[i], length) for i, length in enumerate(lengths)]
    alone, state = weights_by_token(name, lay_out([[x] for x in documents], ALONE))
    packed = lay_out(cut_and_pack(rng, documents, whole), PACKED)
    found, other_state = weights_by_token(name, packed)
    same(found, alone)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), other_state, state)


@pytest.mark.parametrize("name", [*BY_SAMPLE, "sequence"])
def test_two_documents_under_one_number_get_other_weights(name):
    """Negative control; with the numbers of the documents the weights are the same."""
    rng = np.random.default_rng(3)
    documents = [draw_document(rng, i, length) for i, length in enumerate((8, 5, 3, 7, 6, 8))]
    for document in documents:
        document["error_mask"][:] = 1
        document["weights"][:] = 1
    alone, _ = weights_by_token(name, lay_out([[x] for x in documents], ALONE))
    packed = lay_out(cut_and_pack(rng, documents, False), PACKED)
    same(weights_by_token(name, packed)[0], alone)
    ids = packed["sample_ids"]
    merged = packed | {"sample_ids": np.where(ids > 0, (ids + 1) // 2, ids)}
    with pytest.raises(AssertionError):
        same(weights_by_token(name, merged, ids)[0], alone)


def test_an_unknown_sample_is_nan_and_padding_is_none():
    b = {
        "weights": jnp.asarray([[1.0, 2.0, 1.0, 0.0]]),
        "sample_ids": jnp.asarray([[7, 7, -1, 7]], jnp.int32),
    }
    samples = find_samples(b)
    assert samples.live_N.sum() == 1
    values = jnp.asarray([[1.0, 4.0, 5.0, jnp.nan]])
    (mean_N,) = sample_means(samples, b["weights"], values)
    np.testing.assert_array_equal(spread(samples, mean_N), [[3, 3, np.nan, 1]])
