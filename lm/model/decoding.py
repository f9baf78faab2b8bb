"""Sampling text: the prompt fills a KV cache, then one token follows the other.

B batch, P prompt length, S cache length or tokens added, C tokens of a call, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.model.drawn import Measured, Temper, measure, temperatures
from lm.model.interface import CacheQuantizer, KVCache, Model, Tokens

# (hidden states [B, 1, D], head [D, V]) -> logits [B, 1, V].
Logits = Callable[[jax.Array, jax.Array], jax.Array]


def init_cache(
    model: Model, batch: int, length: int, quantizer: CacheQuantizer | None = None
) -> KVCache:
    """An empty cache in the compute dtype, or of codes.

    Args:
      model: the model.
      batch: rows, B.
      length: tokens of a row that fit, S.
      quantizer: that of the model's `LayerProducts`, where it has one.
    """
    c = model.config
    together = c.unrolled_decoding
    shape = (batch, c.kv_heads, length, c.head_width)
    if together < c.layers:  # An axis of size 1 would make XLA copy the arrays on CPU.
        shape = (c.layers // together, *shape)

    def empty():
        if quantizer is None:
            return jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)
        return quantizer.empty(shape)

    segments_BS = jnp.zeros((batch, length), jnp.int32)
    return KVCache(tuple(empty() for _ in range(together)), segments_BS, jnp.zeros((), jnp.int32))


def next_logits(
    model: Model,
    params: Any,
    tokens_BT,
    positions_BT,
    segments_BT,
    cache: KVCache,
    logits: Logits | None = None,
) -> tuple[jax.Array, KVCache]:
    """Logits [B, V] (float32) of the token after the last of `tokens`.

    By `logits`, for a model trained to predict another distribution than the softmax of products;
    otherwise hidden @ head, soft-capped.
    """
    inputs = Tokens(tokens_BT, positions_BT, segments_BT)
    hidden_BTD, _, cache = model.apply(params, inputs, cache)
    if logits is not None:
        return logits(hidden_BTD[:, -1:], model.head(params))[:, 0], cache
    logits_BV = jnp.dot(hidden_BTD[:, -1], model.head(params), preferred_element_type=jnp.float32)
    if cap := model.config.logit_softcap:
        logits_BV = cap * jnp.tanh(logits_BV / cap)
    return logits_BV, cache


def sample(
    key: jax.Array,
    logits_BV: jax.Array,
    *,
    temperature: float | jax.Array,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Draws a token from softmax(logits / temperature), [B] int32.

    Args:
      key: random key, or one a row [B].
      logits_BV: float32.
      temperature: 0 takes the most likely token; or one a row [B], above 0.
      top_k: only the k most likely tokens may be drawn; 0 is off.
      top_p: only the smallest set of most likely tokens whose probability (at this temperature)
        reaches p may be drawn (arXiv 1904.09751); 1 is off.
    """
    if isinstance(temperature, jax.Array):
        temperature = temperature[:, None]
    elif temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = jnp.where(logits_BV < sorted_BV[:, top_k - 1 : top_k], -jnp.inf, logits_BV)
        sorted_BV = sorted_BV.at[:, top_k:].set(-jnp.inf)
    if top_p < 1:
        probs_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # mass of strictly likelier tokens
        last_B1 = jnp.sum(before_BV < top_p, axis=-1, keepdims=True) - 1
        floor_B1 = jnp.take_along_axis(sorted_BV, jnp.maximum(last_B1, 0), axis=-1)
        logits_BV = jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)
    draw = jax.vmap(jax.random.categorical) if key.ndim else jax.random.categorical
    return draw(key, logits_BV).astype(jnp.int32)


class Decoding(NamedTuple):
    """Rows that are being continued.

    Attributes:
      logits_BV: of the next token, float32.
      position_B: of the next token.
      cache: of the tokens so far.
      ended_B: whether a row has ended.
      step: tokens added so far.
      keys_S: a random key for each token that may be added, or [S, B] one of each row.
    """

    logits_BV: jax.Array
    position_B: jax.Array
    cache: KVCache
    ended_B: jax.Array
    step: jax.Array
    keys_S: jax.Array


def start(
    model: Model,
    params: Any,
    prompt_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    logits: Logits | None = None,
    quantizer: CacheQuantizer | None = None,
) -> Decoding:
    """Reads the prompts into a cache with room for `steps` tokens more.

    Args:
      model, params: the model.
      prompt_BP: int32, at least one token a row; shorter prompts are padded on the left.
      prompt_mask_BP: 1 where the prompt is real, 0 in its padding.
      key: random key, or one a row [B]: what a row draws then depends on no other row.
      steps: tokens to add at most; static under `jax.jit`.
      logits: see `next_logits`.
      quantizer: of the cache, see `init_cache`.
    """
    batch, prompt_length = prompt_BP.shape
    segments_BP = prompt_mask_BP.astype(jnp.int32)
    positions_BP = jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)
    cache = init_cache(model, batch, prompt_length + steps, quantizer)
    split = functools.partial(jax.random.split, num=steps)
    split = jax.vmap(split, out_axes=1) if key.ndim else split
    logits_BV, cache = next_logits(
        model, params, prompt_BP, positions_BP, segments_BP, cache, logits
    )
    return Decoding(
        logits_BV,
        positions_BP[:, -1] + 1,
        cache,
        jnp.zeros((batch,), bool),
        jnp.zeros((), jnp.int32),
        split(key),
    )


def advance(
    model: Model,
    params: Any,
    state: Decoding,
    count: int,
    *,
    end_of_text: int = -1,
    other_ends: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    logits: Logits | None = None,
) -> tuple[Decoding, jax.Array]:
    """Adds at most `count` tokens to each row; stops as soon as all rows have ended.

    Args:
      model, params: the model.
      state: of `start` or of the call before.
      count: static under `jax.jit`; no more are added than `start` has room for.
      end_of_text: the token that ends a row; -1 for none.
      other_ends: more tokens that end it.
      temperature, top_k, top_p: see `sample`.
      logits: see `next_logits`.

    Returns:
      The state, and the tokens [B, count] int32; `end_of_text` where a row has ended.
    """
    state, tokens_BC, _ = _advance(
        model,
        params,
        state,
        count,
        (end_of_text, *other_ends),
        functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p),
        lambda *drawn: (),
        logits,
    )
    return state, tokens_BC


def _advance(model, params, state, count, ends, draw, measured, logits):
    """(state, tokens [B, count], what `measured` gave of each, [B, count] in place of [B]).

    `draw` is (key, logits [B, V]) -> tokens [B]; `measured` is (logits [B, V], tokens [B], whether
    a row had ended before [B]) -> a tree of [B]; zeros stand where no row is left.
    """
    batch, end_of_text = state.position_B.shape[0], ends[0]

    def more(carry):
        state, _, _, added = carry
        room = (added < count) & (state.step < state.keys_S.shape[0])
        return room & ~jnp.all(state.ended_B)

    def step(carry):
        state, tokens_BC, all_measured, added = carry
        token_B = draw(state.keys_S[state.step], state.logits_BV)
        token_B = jnp.where(state.ended_B, end_of_text, token_B)
        new = measured(state.logits_BV, token_B, state.ended_B)
        all_measured = jax.tree.map(lambda x, one: x.at[:, added].set(one), all_measured, new)
        logits_BV, cache = next_logits(
            model,
            params,
            token_B[:, None],
            state.position_B[:, None],
            jnp.ones((batch, 1), jnp.int32),
            state.cache,
            logits,
        )
        state = state._replace(
            logits_BV=logits_BV,
            position_B=state.position_B + 1,
            cache=cache,
            ended_B=state.ended_B | jnp.isin(token_B, jnp.array(ends)),
            step=state.step + 1,
        )
        return state, tokens_BC.at[:, added].set(token_B), all_measured, added + 1

    tokens_BC = jnp.full((batch, count), end_of_text, jnp.int32)
    shapes = jax.eval_shape(measured, state.logits_BV, tokens_BC[:, 0], state.ended_B)
    zeros = jax.tree.map(lambda x: jnp.zeros((batch, count), x.dtype), shapes)
    carry = (state, tokens_BC, zeros, jnp.int32(0))
    return jax.lax.while_loop(more, step, carry)[:3]


def generate(
    model: Model,
    params: Any,
    prompt_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    logits: Logits | None = None,
    quantizer: CacheQuantizer | None = None,
    **options: Any,
) -> jax.Array:
    """Continues each prompt by `steps` tokens, [B, steps] int32. Jit it with `steps` static.

    Arguments are those of `start`, options those of `advance`.
    """
    prompts = (prompt_BP, prompt_mask_BP)
    state = start(model, params, *prompts, key, steps=steps, logits=logits, quantizer=quantizer)
    return advance(model, params, state, steps, logits=logits, **options)[1]


class Drawn(NamedTuple):
    """Tokens that follow prompts, and what was known of each when it was drawn.

    Attributes:
      tokens_BS: int32; `end_of_text` where a row has ended.
      measured: of each token, [B, S] in place of [B].
    """

    tokens_BS: jax.Array
    measured: Measured


def draw(
    model: Model,
    params: Any,
    prompt_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    ends: tuple[int, ...],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    group: int = 0,
    temper: Temper | None = None,
    logits: Logits | None = None,
    quantizer: CacheQuantizer | None = None,
) -> Drawn:
    """As `generate`, the same tokens, with `lm.model.drawn.measure` of each. Jit it.

    Args:
      model, params: the model.
      prompt_BP, prompt_mask_BP, key, steps, logits, quantizer: see `start`.
      ends: tokens that end a row, the end of text first; (-1,) for none.
      temperature, top_k, top_p: see `sample`.
      group: rows of a group, for its divergence; 0 leaves it out.
      temper: see `lm.model.drawn.temperatures`.
    """
    prompts = (prompt_BP, prompt_mask_BP)

    def draw_one(key, logits_BV):
        tempered = temperatures(logits_BV, temperature, temper) if temper else temperature
        return sample(key, logits_BV, temperature=tempered, top_k=top_k, top_p=top_p)

    state = start(model, params, *prompts, key, steps=steps, logits=logits, quantizer=quantizer)
    _, tokens_BS, measured = _advance(
        model,
        params,
        state,
        steps,
        ends,
        draw_one,
        functools.partial(measure, temperature=temperature, group=group, temper=temper),
        logits,
    )
    return Drawn(tokens_BS, measured)
