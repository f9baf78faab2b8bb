"""Sampling text: the prompt fills a KV cache, then one token follows the other.

B batch, P prompt length, S cache length, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.model.transformer import KVCache, Model, Tokens

# (hidden states [B, 1, D], head [D, V]) -> logits [B, 1, V].
Logits = Callable[[jax.Array, jax.Array], jax.Array]


def init_cache(model: Model, batch: int, length: int) -> KVCache:
    """An empty cache in the compute dtype.

    Args:
      model: the model.
      batch: rows, B.
      length: tokens of a row that fit, S.
    """
    c = model.config
    shape = (c.layers, batch, c.kv_heads, length, c.head_width)
    return KVCache(
        jnp.zeros(shape, c.dtype),
        jnp.zeros(shape, c.dtype),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((), jnp.int32),
    )


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
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Draws a token from softmax(logits / temperature), [B] int32.

    Args:
      key: random key.
      logits_BV: float32.
      temperature: 0 takes the most likely token.
      top_k: only the k most likely tokens may be drawn; 0 is off.
      top_p: only the smallest set of most likely tokens whose probability (at this temperature)
        reaches p may be drawn (arXiv 1904.09751); 1 is off.
    """
    if temperature == 0:
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
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


class Progress(NamedTuple):
    """Continuations of B prompts, and what their next tokens are computed from.

    Attributes:
      tokens_BS: int32, the tokens drawn so far, then the end of text (0 without one).
      count: int32, the number of tokens drawn so far, the same for all rows.
      ended_B: bool, whether a row has drawn the end of text.
      position_B: int32, of the newest token in its row.
      cache: keys and values of the prompt and of all tokens but the newest.
      keys_S: one random key for each token.
    """

    tokens_BS: jax.Array
    count: jax.Array
    ended_B: jax.Array
    position_B: jax.Array
    cache: KVCache
    keys_S: jax.Array


def start(
    model: Model,
    params: Any,
    prompt_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    end: int | None = None,
    logits: Logits | None = None,
    **options: Any,
) -> Progress:
    """Reads the prompts and draws the first token of each continuation.

    Args:
      model, params: the model.
      prompt_BP: int32, at least one token a row; shorter prompts are padded on the left.
      prompt_mask_BP: 1 where the prompt is real, 0 in its padding.
      key: random key. It and `steps` decide the key of every token.
      steps: the most tokens to add to a prompt; static.
      end: the token that ends a text; None lets no text end.
      logits: see `next_logits`.
      options: temperature, top_k, top_p, see `sample`.
    """
    batch, length = prompt_BP.shape
    segments_BP = prompt_mask_BP.astype(jnp.int32)
    positions_BP = jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)
    cache = init_cache(model, batch, length + steps)
    logits_BV, cache = next_logits(
        model, params, prompt_BP, positions_BP, segments_BP, cache, logits
    )
    progress = Progress(
        jnp.full((batch, steps), 0 if end is None else end, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(batch, bool),
        positions_BP[:, -1],
        cache,
        jax.random.split(key, steps),
    )
    return _draw(progress, logits_BV, end, options)


def advance(
    model: Model,
    params: Any,
    progress: Progress,
    stop: jax.Array | int,
    *,
    end: int | None = None,
    logits: Logits | None = None,
    **options: Any,
) -> Progress:
    """Draws tokens until there are `stop` a row or all rows have ended.

    The model runs once for each token drawn. The tokens do not depend on where earlier calls
    stopped. Arguments are those of `start`; `stop` is at most its `steps`, and may be traced.
    """

    def unfinished(progress: Progress) -> jax.Array:
        return (progress.count < stop) & ~progress.ended_B.all()

    def step(progress: Progress) -> Progress:
        token_B1 = jax.lax.dynamic_slice_in_dim(progress.tokens_BS, progress.count - 1, 1, axis=1)
        logits_BV, cache = next_logits(
            model,
            params,
            token_B1,
            progress.position_B[:, None],
            jnp.ones_like(token_B1),
            progress.cache,
            logits,
        )
        return _draw(progress._replace(cache=cache), logits_BV, end, options)

    return jax.lax.while_loop(unfinished, step, progress)


def _draw(progress: Progress, logits_BV: jax.Array, end: int | None, options: Any) -> Progress:
    """Adds the token that `logits_BV` gives to every row, the end of text to those that ended."""
    token_B = sample(progress.keys_S[progress.count], logits_BV, **options)
    ended_B = progress.ended_B
    if end is not None:
        token_B = jnp.where(ended_B, end, token_B)
        ended_B |= token_B == end
    tokens_BS = jax.lax.dynamic_update_index_in_dim(
        progress.tokens_BS, token_B, progress.count, axis=1
    )
    return progress._replace(
        tokens_BS=tokens_BS,
        count=progress.count + 1,
        ended_B=ended_B,
        position_B=progress.position_B + 1,
    )


def generate(
    model: Model,
    params: Any,
    prompt_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    **options: Any,
) -> jax.Array:
    """Continues each prompt by `steps` tokens, or to the end of text: [B, steps] int32.

    After its end a row is filled with the end of text. Arguments are those of `start`. Jit it with
    `steps` static.
    """
    progress = start(model, params, prompt_BP, prompt_mask_BP, key, steps=steps, **options)
    return advance(model, params, progress, steps, **options).tokens_BS
