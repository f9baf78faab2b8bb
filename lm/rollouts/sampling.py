"""Completions of prompts, drawn from the model as it is trained.

B rows, P tokens of the longest prompt, S tokens of the longest completion.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.compression.phases import Quantized
from lm.data import chats
from lm.data.documents import SpecialToken
from lm.data.tokenizers import Tokenizer
from lm.evaluation.sampling import of_trained, predicted_logits
from lm.model import decoding
from lm.model.drawn import Measured
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.rollouts.prompts import Prompts
from objectives.losses import Loss

# Keeps these keys apart from those of a training step, which folds its number in first: no run has
# a step of this number.
_ROLLOUTS = 0x726F6C6C


class Completions(NamedTuple):
    """What follows the prompts.

    Attributes:
      tokens_BS: int32; the token that ends a text is its last one.
      lengths_B: tokens of each row that were drawn, that one included.
    """

    tokens_BS: jax.Array
    lengths_B: jax.Array


def row_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """A random key a row, [B], that depends on seed, step and row alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ROLLOUTS), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a completion: the end of text, and of a turn where one token does."""
    closing = chats.end_of_turn(tokenizer.chat, tokenizer.special_tokens)
    ends = (tokenizer.special_id(closing),) if isinstance(closing, SpecialToken) else ()
    return tuple(dict.fromkeys((tokenizer.end_of_text, *ends)))


def make_complete(
    model: Model,
    loss: Loss,
    quantized: Quantized | None,
    *,
    tokens: int,
    temperature: float,
    ends: tuple[int, ...],
    top_k: int = 0,
    top_p: float = 1.0,
) -> Callable[[Trained, Prompts, jax.Array], Completions]:
    """(trained, prompts, keys_B) -> completions; jit it.

    Args:
      model: the model.
      loss: decides the distribution that is drawn from.
      quantized: puts weights, activations and the cache on their grids first; None leaves them.
      tokens: S, of a completion at most.
      temperature: that logits are divided by; 0 takes the most likely token.
      ends: tokens that end a completion, the end of text first.
      top_k, top_p: which tokens may be drawn, see `decoding.sample`.
    """
    view, on_grid, quantizer = _running(model, quantized)
    logits_of = predicted_logits(model, loss)

    def complete(trained, prompts, keys_B):
        trained = on_grid(trained)
        tokens_BS = decoding.generate(
            view,
            trained,
            prompts.tokens_BP,
            prompts.mask_BP,
            keys_B,
            steps=tokens,
            logits=logits_of(trained),
            quantizer=quantizer,
            end_of_text=ends[0],
            other_ends=ends[1:],
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        return Completions(tokens_BS, lengths_of(tokens_BS, ends))

    return complete


class Answers(NamedTuple):
    """Completions, and what was known of their tokens when they were drawn.

    Attributes:
      tokens_BS: int32; the token that ends a text is its last one.
      lengths_B: tokens of each row that were drawn, that one included.
      measured: `lm.model.drawn.Measured` of each token, [B, S] in place of [B].
    """

    tokens_BS: jax.Array
    lengths_B: jax.Array
    measured: Measured


def make_answer(
    model: Model,
    quantized: Quantized | None,
    *,
    tokens: int,
    temperature: float,
    ends: tuple[int, ...],
    top_p: float = 1.0,
    group: int = 0,
) -> Callable[..., Answers]:
    """(trained, prompts [B, P], mask [B, P], keys [B], temper=None) -> answers; jit it.

    What is drawn from is softmax(logits / temperature), tempered further by `temper`
    (`lm.model.drawn.temperatures`), logits being those of the model, capped
    where they are. A policy objective has the temperature in its `Loss`: that is not asked, or the
    logits would be divided twice.

    Args:
      model, quantized, tokens, temperature, ends, top_p: see `make_complete`.
      group: rows of a group that stand next to each other, for their divergence; 0 leaves it out.
    """
    view, on_grid, quantizer = _running(model, quantized)

    def answer(trained, prompts_BP, mask_BP, keys_B, temper=None):
        tokens_BS, measured = decoding.draw(
            view,
            on_grid(trained),
            prompts_BP,
            mask_BP,
            keys_B,
            steps=tokens,
            ends=ends,
            temperature=temperature,
            top_p=top_p,
            group=group,
            temper=temper,
            quantizer=quantizer,
        )
        return Answers(tokens_BS, lengths_of(tokens_BS, ends), measured)

    return answer


def lengths_of(tokens_BS: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """The number of tokens up to and with the first that ends a text, or of all; int32 [B]."""
    ended_BS = jnp.isin(tokens_BS, jnp.array(ends))
    all_of_them = tokens_BS.shape[1]
    lengths_B = jnp.where(jnp.any(ended_BS, axis=1), jnp.argmax(ended_BS, axis=1) + 1, all_of_them)
    return lengths_B.astype(jnp.int32)


def _running(model: Model, quantized: Quantized | None):
    """(the model of what is trained, (trained) -> with weights as it reads them, of its cache).

    Weights go on their grids once a batch, not once a token.
    """
    if quantized is None:
        return of_trained(model, None), lambda trained: trained, None
    running = quantized.of_stored()

    def on_grid(trained):
        return trained._replace(params=quantized.on_grid(trained))

    return of_trained(model, running), on_grid, running.cache if running else None
