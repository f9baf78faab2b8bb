import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.compression.cache import first_key_scales, make_cache_quantizer
from lm.model import decoding
from lm.model.interface import LayerProducts, Tokens


def generate(model, params, prompt, mask, steps, quantizer=None):
    options = {"steps": steps, "temperature": 0, "quantizer": quantizer}
    run = functools.partial(decoding.generate, model, **options)
    return jax.jit(run)(params, prompt, mask, jax.random.key(0))


@pytest.mark.parametrize(
    "change", tiny.mostly_slow([{}, {"logit_softcap": 5.0, "kv_heads": 4}], ({},)), ids=str
)
def test_cached_equals_uncached(change):
    model = tiny.model(**change)
    params = tiny.params(model)
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, tiny.VOCAB)
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    ones = jnp.ones((2, 10), jnp.int32)
    hidden = model.apply(params, Tokens(tokens, positions, ones)).hidden
    expected = hidden @ model.head(params)
    if cap := model.config.logit_softcap:
        expected = cap * jnp.tanh(expected / cap)
    cache = decoding.init_cache(model, 2, 10)
    step = jax.jit(functools.partial(decoding.next_logits, model))
    for chunk in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 10)):
        out, cache = step(params, tokens[:, chunk], positions[:, chunk], ones[:, chunk], cache)
        np.testing.assert_allclose(out, expected[:, chunk.stop - 1], atol=1e-5)
    assert cache.length == 10


def test_a_token_is_written_to_the_cache_in_place():
    """In the compiled loop over tokens nothing copies the keys and values of a layer.

    The control is a loop that carries the layers stacked, as a scan over layers would.
    """
    model = tiny.model()
    params = tiny.params(model)
    ones = jnp.ones((3, 1), jnp.int32)

    def stack(cache):
        together = zip(*cache.layers, strict=True)
        return cache._replace(layers=tuple(map(jnp.stack, together)))

    def unstack(cache):
        apart = zip(*map(jnp.unstack, cache.layers), strict=True)
        return cache._replace(layers=tuple(apart))

    def same(cache):
        return cache

    def copies(carried, used):
        def step(_, cache):
            return carried(decoding.next_logits(model, params, ones, ones, ones, used(cache))[1])

        def run():
            return jax.lax.fori_loop(0, 9, step, carried(decoding.init_cache(model, 3, 13)))

        text = jax.jit(run).lower().compile().as_text()
        (body,) = set(re.findall(r" while\(.*body=(%[\w.\-]+)", text))
        lines = text.split(f"\n{body} ")[1].split("\n}")[0].splitlines()
        size = decoding.init_cache(model, 3, 13).layers[0][0].size
        moved = [line for line in lines if re.search(r" = f32.*(copy|concatenate|slice)", line)]
        moved = [line for line in moved if "dynamic-update-slice" not in line]
        shapes = [re.search(r" = f32\[([\d,]*)\]", line)[1] for line in moved]
        return sum(math.prod(map(int, s.split(","))) >= size for s in shapes if s)

    assert copies(same, same) == 0
    assert copies(stack, unstack) > 0


def with_cache_of(bits, model, params):
    """(model that reads a cache of codes, the quantizer of the cache)."""
    quantizer = make_cache_quantizer(bits, model.config.head_width)
    steps = first_key_scales(model, params, bits)
    products = LayerProducts(cache=quantizer, key_scales=steps)
    return model._replace(apply=functools.partial(model.apply, products=products)), quantizer


@pytest.mark.parametrize(
    ("bits", "change"),
    [
        (8, {}),
        pytest.param(4, {}, marks=pytest.mark.slow),
        # Layers in a loop, some with a window and some without rotary positions.
        pytest.param(
            4,
            {"unroll": 1, "layer_pattern": "LN", "window": 4, "qk_norm": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_cache_of_codes_gives_what_a_pass_over_the_whole_text_gives(bits, change):
    """With and without a cache attention reads the same numbers, and they are not the floats."""
    model = tiny.model(**change)
    params = tiny.params(model)
    quantized, quantizer = with_cache_of(bits, model, params)
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, tiny.VOCAB)
    positions = jnp.broadcast_to(jnp.arange(10), (2, 10))
    ones = jnp.ones((2, 10), jnp.int32)
    expected, plain = (
        jax.jit(m.apply)(params, Tokens(tokens, positions, ones)).hidden @ m.head(params)
        for m in (quantized, model)
    )
    cache = decoding.init_cache(quantized, 2, 10, quantizer)
    step = jax.jit(functools.partial(decoding.next_logits, quantized))
    for chunk in (slice(0, 4), *(slice(i, i + 1) for i in range(4, 10))):
        out, cache = step(params, tokens[:, chunk], positions[:, chunk], ones[:, chunk], cache)
        np.testing.assert_allclose(out, expected[:, chunk.stop - 1], atol=1e-5)
        assert np.abs(out - plain[:, chunk.stop - 1]).max() > 1e-3  # negative control
    code = jnp.int8 if bits == 8 else jnp.uint8
    floats = decoding.init_cache(model, 2, 10)
    for keys, values, scales in cache.layers:
        assert (keys.dtype, values.dtype, scales.dtype) == (code, code, jnp.float32)
    for keys, values in floats.layers:
        assert keys.dtype == values.dtype == jnp.float32
    sizes = [sum(x.nbytes for x in jax.tree.leaves(c.layers)) for c in (cache, floats)]
    # Of 64 bytes that a key and a value of 8 channels take, 16 or 8 and a scale of 4.
    assert sizes[0] / sizes[1] == ({8: 16, 4: 8}[bits] + 4) / 64


@pytest.mark.slow
def test_a_prompt_padded_on_the_left_continues_as_alone_from_a_cache_of_codes():
    model = tiny.model()
    params = tiny.params(model)
    quantized, quantizer = with_cache_of(4, model, params)
    prompt = jax.random.randint(jax.random.key(1), (1, 5), 0, tiny.VOCAB)
    padded = jnp.concatenate([jnp.full((1, 3), 7), prompt], axis=1)
    mask = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1]])
    alone = generate(quantized, params, prompt, jnp.ones_like(prompt), 6, quantizer)
    beside = generate(quantized, params, padded, mask, 6, quantizer)
    np.testing.assert_array_equal(alone, beside)


def test_generates_what_the_uncached_model_would():
    model = tiny.model()
    params = tiny.params(model)
    prompt = jax.random.randint(jax.random.key(1), (3, 6), 0, tiny.VOCAB)
    out = generate(model, params, prompt, jnp.ones_like(prompt), steps=8)
    text = jnp.pad(prompt, ((0, 0), (0, 8)))  # what comes later changes nothing
    positions = jnp.broadcast_to(jnp.arange(14), text.shape)
    hidden = jax.jit(model.apply)
    for t in range(6, 14):
        found = hidden(params, Tokens(text, positions, jnp.ones_like(text))).hidden
        logits = found[:, t - 1] @ model.head(params)
        text = text.at[:, t].set(jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(out, text[:, 6:])


def test_a_prompt_padded_on_the_left_continues_as_alone():
    model = tiny.model()
    params = tiny.params(model)
    prompt = jax.random.randint(jax.random.key(1), (1, 5), 0, tiny.VOCAB)
    padded = jnp.concatenate([jnp.full((1, 3), 7), prompt], axis=1)
    mask = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1]])
    alone = generate(model, params, prompt, jnp.ones_like(prompt), steps=6)
    beside = generate(model, params, padded, mask, steps=6)
    np.testing.assert_array_equal(alone, beside)


END = 5


def rigged(length):
    """(model, parameters): END is the most likely token once the cache holds `length` tokens."""
    model = tiny.model(layers=1)

    def apply(params, inputs, cache=None, **options):
        outputs = model.apply(params, inputs, cache, **options)
        ends = cache.length + inputs.tokens.shape[1] >= length
        one_hot = jax.nn.one_hot(jnp.where(ends, END, 7), tiny.VOCAB)
        return outputs._replace(
            hidden=jnp.broadcast_to(one_hot, (*inputs.tokens.shape, tiny.VOCAB))
        )

    return model._replace(apply=apply, head=lambda params: jnp.eye(tiny.VOCAB)), tiny.params(model)


def test_decoding_stops_at_the_end_of_text_and_not_before():
    """After the step that draws it no other is taken; without an end all are."""
    model, params = rigged(length=6)
    prompt = jnp.ones((2, 4), jnp.int32)

    def steps_taken(end):
        state = decoding.start(
            model, params, prompt, jnp.ones_like(prompt), jax.random.key(0), steps=30
        )
        state, tokens = decoding.advance(model, params, state, 30, end_of_text=end, temperature=0.0)
        return int(state.step), tokens

    taken, tokens = steps_taken(END)
    assert taken == 3
    np.testing.assert_array_equal(tokens[:, :3], [[7, 7, END]] * 2)
    assert (tokens[:, 3:] == END).all()
    assert steps_taken(-1)[0] == 30


def draws(logits, n=2000, **options):
    keys = jax.random.split(jax.random.key(0), n)
    one = jax.vmap(lambda k: decoding.sample(k, logits[None], **options)[0])
    return np.bincount(np.asarray(one(keys)), minlength=len(logits)) / n


def test_frequencies_follow_the_softmax():
    logits = jnp.array([1.0, 0.0, -1.0, 2.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = jax.nn.softmax(logits / temperature)
        np.testing.assert_allclose(draws(logits, temperature=temperature), expected, atol=0.04)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0.05, 0.99))
def test_top_k_and_top_p_draw_only_from_the_likeliest(seed, k, p):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=8).astype(np.float32) * 2
    probs = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum()
    order = np.argsort(-probs)
    nucleus = order[: np.searchsorted(np.cumsum(probs[order]), p - 1e-6) + 1]
    for seed in range(5):
        key = jax.random.key(seed)
        token = decoding.sample(key, jnp.asarray(logits)[None], temperature=1.0, top_k=k)
        assert int(token[0]) in order[:k]
        token = decoding.sample(key, jnp.asarray(logits)[None], temperature=1.0, top_p=p)
        assert int(token[0]) in nucleus


def test_a_tiny_nucleus_is_greedy():
    logits = jnp.array([0.1, 0.3, 0.2])
    assert draws(logits, n=50, temperature=1.0, top_p=0.01)[1] == 1
    assert draws(logits, n=50, temperature=1.0, top_k=1)[1] == 1
