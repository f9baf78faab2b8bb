"""Codes in another order, complements, and two codes that a norm makes one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_embeddings import ALL, logits, model, random_params

from lm.errors import InputError
from lm.model import codes
from lm.model.embeddings import (
    affine_recode,
    lift,
    token_codes,
)

READS = ("query", "key", "value", "up", "gate")


def permuted(params, order):
    """The parameters of the same function of a residual stream with its channels in `order`."""

    def permute(path, x):
        name = path[-1].key
        if name in ("scale", "bias"):
            return x[..., order]
        if name == "kernel" or name in READS:
            return jnp.take(x, order, axis=-2)
        assert name in ("output", "down")
        return x[..., order]

    return jax.tree_util.tree_map_with_path(permute, params)


@pytest.mark.parametrize("width", tiny.mostly_slow([40, 32], (40,)))
@pytest.mark.parametrize("norm", tiny.mostly_slow(["rmsnorm", "layernorm"], ("rmsnorm",)))
def test_layout_and_bit_order_are_permutations_of_channels(width, norm):
    """The same logits with permuted weights, and others without (K = 5: 32 is no multiple)."""
    options = {"width": width, "norm": norm, "accept_aliasing": True, "activation": "swiglu"}
    tile = model(32, embedding="binary", **options)
    interleave = model(32, embedding="binary", code_layout="interleave", **options)
    params = random_params(tile)
    tokens = jnp.arange(32).reshape(2, 16)
    expected = logits(tile, params, tokens)
    order = np.argsort(np.arange(width) % 5, kind="stable")
    np.testing.assert_allclose(
        logits(interleave, permuted(params, order), tokens), expected, atol=2e-5
    )
    assert np.abs(logits(interleave, params, tokens) - expected).max() > 0.1
    if width % 5 == 0:
        # Bit j of the permuted code is bit `bits[j]` of the id.
        bits = np.array([3, 0, 4, 2, 1])
        recoded = affine_recode(tokens, np.eye(5, dtype=int)[bits], 0)
        order = (np.arange(width).reshape(-1, 5)[:, bits]).ravel()
        np.testing.assert_allclose(
            logits(tile, permuted(params, order), recoded), expected, atol=2e-5
        )


def test_layernorm_of_the_complement_is_the_negative():
    """LN(1 - x) = -LN(x) and LN(2 x - 1) = LN(x), up to the epsilon; RMSNorm has neither."""

    def norm(x, mean):
        x = np.float64(x)
        x = x - x.mean(-1, keepdims=True) * mean
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True))

    x = np.asarray(lift(token_codes(ALL[1:500], 16), 64))
    np.testing.assert_allclose(norm(1 - x, 1), -norm(x, 1), atol=1e-12)
    np.testing.assert_allclose(norm(2 * x - 1, 1), norm(x, 1), atol=1e-12)
    assert np.abs(norm(1 - x, 0) + norm(x, 0)).max() > 0.5
    assert np.abs(norm(2 * x - 1, 0) - norm(x, 0)).max() > 0.5


def spread(made, *pairs):
    """Largest difference that swapping two ids in a text makes to any logit, for each pair."""
    texts = [[[5, a, 9, 2, b, 3], [5, b, 9, 2, a, 3]] for a, b in pairs]
    out = logits(made, random_params(made), jnp.asarray(texts).reshape(-1, 6))
    return np.abs(out[::2] - out[1::2]).max(axis=(1, 2))


ALIASING = {"norm": "layernorm", "embedding": "binary"}


@pytest.mark.parametrize(
    "change",
    tiny.mostly_slow(
        [
            {},
            {"code_values": "plus_minus_one"},
            {"code_layout": "interleave", "code_scale": 2.0},
            {"width": 40},
            {"embedding": "affine", "code_seed": 3},
            {"embedding": "random_codes", "code_seed": 2},
        ],
        ({}, {"width": 40}),
    ),
    ids=str,
)
def test_layernorm_aliases_two_tokens_which_is_refused(change):
    options = {**ALIASING, **change}
    with pytest.raises(InputError, match=r"rmsnorm.*code_signs.*projected.*code_bits=6.*accept"):
        model(32, **options)
    made = model(32, **options, accept_aliasing=True)
    pair = made.config.aliased_ids()
    assert len(set(pair)) == 2
    if options["embedding"] == "binary":
        assert pair == (0, 31)
    same, other = spread(made, pair, (pair[0] ^ 1, pair[1]))
    assert same < 2e-5
    assert other > 0.01


@pytest.mark.parametrize(
    "remedy",
    tiny.mostly_slow(
        [
            {"norm": "rmsnorm"},
            {"code_signs": "alternate"},
            {"code_signs": "random", "code_seed": 1},
            {"code_bits": 6},
            {"embedding": "projected"},
            {"embedding": "gaussian"},
            {"embedding": "learned"},
        ],
        ({"norm": "rmsnorm"}, {"code_bits": 6}),
    ),
    ids=str,
)
def test_each_remedy_removes_the_aliasing(remedy):
    made = model(32, **{**ALIASING, **remedy})
    assert made.config.aliased_ids() is None
    assert spread(made, (0, 31)) > 0.01


def test_aliasing_needs_both_codes_and_signs_that_differ():
    assert model(31, **ALIASING).config.aliased_ids() is None
    # One copy of the code has one sign.
    options = {**ALIASING, "width": 8, "code_signs": "alternate"}
    with pytest.raises(InputError, match="accept_aliasing"):
        model(256, **options)
    # With a bit to spare a recoding uses both codes for a quarter of the seeds; never wrongly.
    found = 0
    for seed in range(40):
        for name in ("affine", "random_codes"):
            options = {**ALIASING, "embedding": name, "code_bits": 6, "code_seed": seed}
            pair = model(32, **options, accept_aliasing=True).config.aliased_ids()
            bits = np.asarray(codes.CODES[name](6, seed).encode(np.arange(32)))
            uniform = {bit: np.flatnonzero((bits == bit).all(1)).tolist() for bit in (0, 1)}
            expected = (*uniform[0], *uniform[1]) if uniform[0] and uniform[1] else None
            assert pair == expected
            found += pair is not None
    assert 8 < found < 32
