"""Prompts from the rows of a batch: what a document asks, or how a row of plain text begins.

B rows, T tokens of a row, P tokens of the longest prompt.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.data.documents import Corpus, Document
from lm.data.layout import rendered
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError


class Prompts(NamedTuple):
    """One prompt a row, as the decoder reads it.

    Attributes:
      tokens_BP: int32, padded on the left.
      mask_BP: int32, 1 where the prompt is real, 0 in its padding; at least one 1 a row.
      found_B: whether the row has a prompt; otherwise what stands here is no text.
      sample_ids_B: document that it comes from.
      sample_positions_B: place of its first token in that document.
    """

    tokens_BP: jax.Array
    mask_BP: jax.Array
    found_B: jax.Array
    sample_ids_B: jax.Array
    sample_positions_B: jax.Array


def read_prompts(
    batch: Mapping[str, jax.Array], keys_B: jax.Array, longest: int, plain: int = 0
) -> Prompts:
    """Finds a prompt in every row.

    Documents with a prompt begin with targets of weight 0: the prompt reaches up to the first
    target of another weight, which is what the answer begins with. Of a chat that is all before its
    first answer. Of several in one row one is drawn, each as likely as the other; a document counts
    where the row has its beginning and the beginning of its answer. In a row without such a
    document the first `plain` tokens are the prompt: those of a document, or of the piece of it
    that the row begins with.

    Args:
      batch: see `lm.data.batches`.
      keys_B: a random key a row.
      longest: P; of a longer prompt the last P tokens are kept.
      plain: tokens of a prompt in a row without a document that has one; 0 finds none there.
    """
    segments_BT, weights_BT = batch["segment_ids"], batch["weights"]
    length = segments_BT.shape[1]
    place_T = jnp.arange(length)
    live_BT = segments_BT > 0
    first_BT = live_BT & (segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1])
    start_BT = jax.lax.cummax(jnp.where(first_BT, place_T, 0), axis=1)
    target_BT = (live_BT & (weights_BT != 0)).astype(jnp.int32)
    before_BT = jnp.cumsum(target_BT, axis=1) - target_BT

    def at_start(x_BT):
        return jnp.take_along_axis(x_BT, start_BT, axis=1)

    # The last token of a prompt is the one whose target is the first of the answer.
    last_BT = (target_BT != 0) & (before_BT == at_start(before_BT)) & (place_T > start_BT)
    last_BT &= at_start(batch["sample_positions"]) == 0
    draw_BT = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys_B)
    last_B = jnp.argmax(jnp.where(last_BT, draw_BT, -1.0), axis=1)
    found_B = jnp.any(last_BT, axis=1)
    first_B = jnp.take_along_axis(start_BT, last_B[:, None], axis=1)[:, 0]
    if plain:
        same_BT = live_BT & (segments_BT == segments_BT[:, :1])
        piece_B = jnp.minimum(jnp.sum(same_BT, axis=1), plain)
        last_B = jnp.where(found_B, last_B, jnp.maximum(piece_B, 1) - 1)
        first_B = jnp.where(found_B, first_B, 0)
        found_B |= piece_B > 0
    first_B = jnp.maximum(first_B, last_B - longest + 1)
    place_BP = last_B[:, None] + jnp.arange(1 - longest, 1)
    mask_BP = place_BP >= first_B[:, None]

    def taken(name, place):
        return jnp.take_along_axis(batch[name], jnp.maximum(place, 0), axis=1)

    return Prompts(
        jnp.where(mask_BP, taken("tokens", place_BP), 0),
        mask_BP.astype(jnp.int32),
        found_B,
        taken("sample_ids", first_B[:, None])[:, 0],
        taken("sample_positions", first_B[:, None])[:, 0],
    )


def check_prompts(corpora: Sequence[Corpus], tokenizer: Tokenizer, plain: int) -> None:
    """Refuses corpora in which `read_prompts` would find nothing.

    Reads documents up to the first one with a prompt.

    Raises:
      InputError: no document has one, and plain text gives none.
    """
    if plain:
        return
    documents = (one for corpus in corpora for one in _all(corpus.documents))
    if not any(_has_prompt(rendered(document, tokenizer)) for document in documents):
        raise InputError(
            "data.corpus: no document has a prompt to sample an answer to; valid: records with "
            "prompt and response or with messages, or rollouts.prompt_tokens above 0, which takes "
            "the beginnings of plain text"
        )


def _all(documents: Sequence[Document]):
    return (documents[index] for index in range(len(documents)))


def _has_prompt(document: Document) -> bool:
    """Whether text of weight 0 stands before text of another weight."""
    spans = [(text, weight) for text, weight in document.spans if text]
    return bool(spans) and spans[0][1] == 0 and any(weight != 0 for _, weight in spans)
