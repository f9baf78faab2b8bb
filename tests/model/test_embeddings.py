"""Codes as functions: distinct, invertible, balanced, drawn uniformly, lifted without a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import InputError
from lm.model import codes
from lm.model.config import CHOICES, TABLES, ModelConfig
from lm.model.embeddings import (
    INTERFACES,
    affine_recode,
    draw_affine,
    invert_affine,
    lift,
    token_codes,
)
from lm.model.interface import Tokens
from lm.model.transformer import make_model

ALL = np.arange(1 << 16, dtype=np.int32)
CODED = tuple(codes.CODES)


def model(vocab_size=tiny.VOCAB, **overrides):
    c = tiny.config().model
    c.update(overrides)
    return make_model(ModelConfig(vocab_size=vocab_size, **c))


def logits(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(
        lambda p, t: model.apply(p, Tokens(t, positions, jnp.ones_like(t))).hidden @ model.head(p)
    )
    return np.asarray(run(params, tokens))


def random_params(model):
    """Parameters that break the symmetries of an initialisation, without compiling one."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.normal(size=shape.shape)
        if path[-1].key in ("scale", "bias"):
            return jnp.float32((path[-1].key == "scale") + 0.1 * x)
        return jnp.float32(x * shape.shape[-2] ** -0.5)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def vectors(model, ids):
    """Output of the interface alone, [ids, D]."""
    module = INTERFACES[model.config.embedding](model.config)
    ids = jnp.asarray(ids)[None]
    variables = module.init(jax.random.key(0), ids)
    return np.asarray(jax.jit(lambda ids: module.apply(variables, ids))(ids))[0]


def test_all_codes_are_distinct_and_decode_back():
    bits = np.asarray(token_codes(ALL, 16))
    assert set(np.unique(bits)) == {0, 1}
    np.testing.assert_array_equal(bits @ (1 << np.arange(16)), ALL)  # least significant first
    np.testing.assert_array_equal(bits.mean(0), 0.5)


@pytest.mark.parametrize("seeds", tiny.mostly_slow([range(12), range(12, 100)], [range(12)]))
def test_affine_recodings_are_permutations_that_decode_back(seeds):
    for seed in seeds:
        matrix, offset = draw_affine(seed, 16)
        recoded = np.asarray(affine_recode(ALL, matrix, offset))
        assert (np.bincount(recoded, minlength=1 << 16) == 1).all()
        np.testing.assert_array_equal(affine_recode(recoded, *invert_affine(matrix, offset)), ALL)
        assert (recoded != ALL).mean() > 0.99
        if seed < 10:
            # The definition, in whole matrices of bits.
            bits, b = np.asarray(token_codes(ALL, 16)), offset >> np.arange(16) & 1
            expected = (bits @ matrix.T.astype(np.int64) + b) % 2
            np.testing.assert_array_equal(token_codes(recoded, 16), expected)
            np.testing.assert_array_equal(expected.mean(0), 0.5)
            np.testing.assert_array_equal(affine_recode(ALL[:9], matrix, b), recoded[:9])
    np.testing.assert_array_equal(affine_recode(ALL, np.eye(16, dtype=int), 0), ALL)


def test_a_singular_matrix_collides_and_has_no_inverse():
    """Negative control."""
    matrix = draw_affine(0, 16)[0].copy()
    matrix[3] = matrix[5] ^ matrix[7]
    assert codes.rank(matrix) == 15
    assert len(np.unique(affine_recode(ALL, matrix, 0))) == 1 << 15
    with pytest.raises(ValueError, match="singular"):
        invert_affine(matrix, 0)


def test_the_draw_is_uniform():
    rng = np.random.default_rng(0)
    accepted = [codes.rank(m) == 16 for m in rng.integers(0, 2, (10_000, 16, 16))]
    # 0.288793 is the product of 1 - 2^-i; 0.0045 is a standard error.
    assert abs(np.mean(accepted) - np.prod(1 - 0.5 ** np.arange(1, 17))) < 4 * 0.0045
    drawn = [draw_affine(seed, 2) for seed in range(3000)]
    counts = np.bincount([m.ravel() @ [1, 2, 4, 8] for m, _ in drawn], minlength=16)
    counts = counts[counts > 0]
    assert len(counts) == 6  # GL(2, 2)
    assert ((counts - 500) ** 2 / 500).sum() < 25  # chi-square, 5 degrees of freedom: p = 1e-4
    assert np.ptp(np.bincount([b for _, b in drawn])) < 150
    again = draw_affine(7, 16)
    np.testing.assert_array_equal(again[0], draw_affine(7, 16)[0])
    assert (again[0] != draw_affine(8, 16)[0]).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10), st.integers(0, 2**31))
def test_rank_is_that_of_elimination(size, seed):
    matrix = np.random.default_rng(seed).integers(0, 2, (size, size))
    spanned = {0}
    for row in matrix:
        spanned |= {x ^ int(row @ (1 << np.arange(size))) for x in spanned}
    assert 2 ** codes.rank(matrix) == len(spanned)


@pytest.mark.parametrize("bits", tiny.mostly_slow([1, 2, 3, 7, 16], (3, 16)))
def test_the_permutation_of_random_codes_is_one(bits):
    ids = np.arange(1 << bits)
    permuted = np.asarray(codes.permute_ids(ids, bits, 3))
    np.testing.assert_array_equal(np.sort(permuted), ids)
    np.testing.assert_array_equal(codes.permute_ids(permuted, bits, 3, inverse=True), ids)
    if bits == 16:
        other = np.asarray(codes.permute_ids(ids, bits, 4))
        assert (permuted == other).mean() < 1e-3
        # Near ids get unrelated codes: half of the bits differ. Plain codes differ in 2 of 16.
        differ = np.bitwise_count(permuted[1:] ^ permuted[:-1])
        assert abs(differ.mean() - 8) < 0.1
        assert abs(differ.var() - 4) < 0.2


@pytest.mark.parametrize("bits", tiny.mostly_slow([16, 24, 32, 70], (24,)))
def test_long_random_codes_are_distinct_and_fair(bits):
    code = codes.random_codes(bits, seed=1)
    drawn = np.asarray(code.encode(ALL))
    assert drawn.shape == (1 << 16, bits)
    assert len(np.unique(np.packbits(drawn, axis=1), axis=0)) == 1 << 16
    assert np.abs(drawn.mean(0) - 0.5).max() < 0.01
    correlation = np.corrcoef(drawn.T) - np.eye(bits)
    assert np.abs(correlation).max() < 0.02
    word = drawn[:, :32].astype(np.uint64) @ (np.uint64(1) << np.arange(min(bits, 32), dtype="u8"))
    np.testing.assert_array_equal(code.decode(word.astype(np.uint32)), ALL)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 2**20), st.sampled_from(CODED), st.integers(0, 1000))
def test_any_vocabulary_is_told_apart(vocab_size, name, seed):
    bits = codes.minimal_bits(vocab_size)
    assert 2 ** (bits - 1) < vocab_size <= 2**bits or vocab_size == 2
    # All ids of a small vocabulary, both ends of a large one.
    ids = np.arange(vocab_size, dtype=np.int32)
    ids = ids if vocab_size < 5000 else np.concatenate([ids[:1000], ids[-1000:]])
    coded = np.asarray(codes.CODES[name](bits, seed).encode(ids))
    words = coded @ (1 << np.arange(bits))
    assert len(np.unique(words)) == len(ids)
    decoded = codes.CODES[name](bits, seed).decode(words.astype(np.uint32))
    np.testing.assert_array_equal(decoded, ids)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("vocab_size", tiny.mostly_slow([2, 3, 257, 1 << 20], (257,)))
def test_any_vocabulary_makes_a_model(name, vocab_size):
    made = model(vocab_size, embedding=name)
    ids = np.unique(np.linspace(0, vocab_size - 1, 400).astype(np.int32))
    assert len(np.unique(vectors(made, ids), axis=0)) == len(ids)


def test_a_missing_bit_aliases():
    """Negative control of the tests above."""
    assert len(np.unique(token_codes(ALL[:257], 8), axis=0)) == 256
    with pytest.raises(ValueError, match="num_bits=32"):
        token_codes(ALL, 32)


@pytest.mark.parametrize("width", [16, 64, 100])
@pytest.mark.parametrize("signs", [None, "alternate"])
def test_the_lift_repeats_every_bit(width, signs):
    copies = -(-width // 16)
    signs = signs and codes.sign_pattern(signs, copies)
    channels = np.arange(width)
    tile = np.asarray(lift(token_codes(ALL[:999], 16), width, signs=signs))
    factor = np.ones(width) if signs is None else signs[channels // 16]
    expected = (ALL[:999, None] >> (channels % 16) & 1) * factor
    np.testing.assert_array_equal(tile, expected)
    # Interleaving is a permutation of channels, and has neighbours where tiles have strides.
    interleave = lift(token_codes(ALL[:999], 16), width, layout="interleave", signs=signs)
    order = np.argsort(channels % 16, kind="stable")
    np.testing.assert_array_equal(interleave, tile[:, order])
    assert (width == 16) == (np.asarray(interleave) == tile).all()


def test_values_and_scale():
    bits = token_codes(ALL[:99], 16)
    plain = np.asarray(lift(bits, 40))
    signed = lift(bits, 40, values="plus_minus_one", scale=3.0)
    np.testing.assert_array_equal(signed, 3 * (2 * plain - 1))
    assert lift(bits, 40, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    for wrong in ({"width": 15}, {"layout": "tiled"}, {"signs": np.ones(2)}):
        with pytest.raises(ValueError, match=r"width|layout|signs"):
            lift(bits, **({"width": 40} | wrong))


@pytest.mark.parametrize("name", tiny.mostly_slow([*CODED, "gaussian"], ("binary", "random_codes")))
def test_no_gather_and_no_table(name):
    """The interface is arithmetic on ids: no gather, and constants of about the width."""
    made = model(1 << 16, embedding=name, width=64, code_signs="alternate")
    module = INTERFACES[name](made.config)
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    assert module.init(jax.random.key(0), jnp.zeros(ids.shape, ids.dtype)) == {}
    traced = jax.make_jaxpr(lambda ids: module.apply({}, ids))(ids)
    assert "gather" not in str(traced)
    assert sum(np.size(constant) for constant in traced.consts) <= 2 * 64


def test_a_table_gathers():
    """Negative control."""
    module = INTERFACES["learned"](model(embedding="learned").config)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert "gather" in str(jax.make_jaxpr(module.apply)(variables, jnp.zeros((1, 2), jnp.int32)))


MEAN_SQUARES = {"binary": 0.5, "affine": 0.5, "random_codes": 0.5}


@pytest.mark.parametrize("name", tiny.mostly_slow(INTERFACES, ("learned", "binary")))
def test_mean_square_of_the_input(name):
    made = model(1 << 12, embedding=name, width=96, kv_heads=4)
    x = vectors(made, np.arange(1 << 12))
    assert np.square(x).mean() == pytest.approx(MEAN_SQUARES.get(name, 1.0), rel=0.25)
    if name in CODED:
        made = model(1 << 12, embedding=name, width=96, code_values="plus_minus_one")
        np.testing.assert_array_equal(np.abs(vectors(made, np.arange(1 << 12))), 1)


def test_gaussian_vectors_are_frozen_normal_and_of_the_seed():
    made = model(1 << 12, embedding="gaussian", width=64)
    x = vectors(made, np.arange(4096))
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert abs(np.mean(x**4) - 3) < 0.05
    products = x @ x.T / 64
    np.fill_diagonal(products, 0)
    assert np.abs(products).max() < 0.85
    np.testing.assert_array_equal(vectors(made, [7, 9, 7]), x[[7, 9, 7]])
    other = model(1 << 12, embedding="gaussian", width=64, code_seed=1)
    assert np.abs(vectors(other, [7]) - x[7]).max() > 0.5


def test_the_low_rank_table_has_its_rank():
    made = model(1 << 10, embedding="learned_low_rank", embedding_rank=6)
    assert np.linalg.matrix_rank(vectors(made, np.arange(1 << 10))) == 6
    shapes = jax.eval_shape(made.init, jax.random.key(0))["embedding"]
    assert {k: v.shape for k, v in shapes.items()} == {"table": (1024, 6), "projection": (6, 32)}


HEADS = [
    *({"embedding": name, "code_head": True} for name in (*CODED, "gaussian", "projected")),
    *({"embedding": name, "tied_head": True} for name in TABLES),
]


@pytest.mark.parametrize("change", tiny.mostly_slow(HEADS, (HEADS[0], HEADS[-1])), ids=str)
def test_a_head_of_the_interface_starts_with_unit_logits(change):
    made = model(1 << 8, width=96, kv_heads=4, **change)
    params = jax.jit(made.init)(jax.random.key(0))
    assert "head" not in params
    assert ("embedding" in params) == (change["embedding"] in (*TABLES, "projected"))
    hidden = jax.random.normal(jax.random.key(1), (500, 96))
    head = made.head(params)
    assert head.shape == (96, 1 << 8)
    assert np.asarray(hidden @ head).std() == pytest.approx(1, rel=0.2)
    expected_rank = {"gaussian": 96, "learned": 96, "learned_low_rank": 32}
    assert np.linalg.matrix_rank(head) == expected_rank.get(change["embedding"], 8)


def test_a_code_head_predicts_bits_independently():
    """The limit that its docstring names: p(id) is the product of the probabilities of its bits."""
    made = model(1 << 4, embedding="binary", code_head=True)
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (32,)) @ made.head({}))
    bits = np.asarray(token_codes(np.arange(16), 4))
    marginal = p @ bits
    np.testing.assert_allclose(
        p, np.prod(np.where(bits, marginal, 1 - marginal), axis=1), rtol=1e-5
    )


def test_names_of_the_config_are_those_of_the_interfaces():
    assert set(CHOICES["embedding"]) == set(INTERFACES)
    assert set(TABLES) | set(CODED) < set(INTERFACES)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"embedding": "binry"}, "did you mean 'binary'"),
        ({"embedding": "binary", "tied_head": True}, r"model\.tied_head=False.*model\.code_head"),
        ({"embedding": "gaussian", "tied_head": True}, "needs a table"),
        ({"code_head": True}, r"use model\.tied_head=True"),
        ({"tied_head": True, "code_head": True}, "two heads"),
        ({"embedding": "affine", "code_bits": 5}, "0 or 6 to 31"),
        ({"embedding": "random_codes", "code_bits": 33}, "0 or 6 to 32"),
        ({"embedding": "binary", "width": 4, "heads": 1, "kv_heads": 1}, "too small for the 6"),
        ({"code_scale": 0.0}, r"model\.code_scale"),
        ({"code_seed": -1}, r"model\.code_seed"),
        ({"code_values": "01"}, "zero_one, plus_minus_one"),
        ({"embedding_rank": 0}, r"model\.embedding_rank=0"),
    ],
)
def test_refuses(change, names):
    with pytest.raises(InputError, match=names):
        model(**change)
