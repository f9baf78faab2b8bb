"""Values of a trained model at every position of a corpus, once, to be stored beside it.

B rows, T tokens, D width, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.alignment import at_starts, chunk_sums, common_ends
from lm.data.documents import Corpus, Document
from lm.data.layout import encode_document, make_row, rendered
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError
from lm.model.interface import Model
from lm.training.forward import make_forward
from objectives.losses import CROSS_ENTROPY, Loss
from objectives.weighting.critical_token import contrast_probability
from objectives.weighting.fait import error_mask

# Positions whose logits are there at the same time, two models and V entries each.
_CHUNK = 128


def make_contrast(positive: Model, negative: Model) -> Callable[..., jax.Array]:
    """((trained, trained), batch) -> `contrast_probability` of the targets, [B, T] float32."""
    models = (positive, negative)

    def contrast(trained, batch):
        outputs, heads = zip(
            *(make_forward(m)(t, batch) for m, t in zip(models, trained, strict=True)), strict=True
        )

        def of_one(inputs):
            *hidden_D, target = inputs
            logits = [
                _cap(jnp.matmul(x_D, head_DV, preferred_element_type=jnp.float32), m)
                for x_D, head_DV, m in zip(hidden_D, heads, models, strict=True)
            ]
            return contrast_probability(*logits, target)

        targets_BT = batch["targets"]
        flat = [x_BTD.reshape(-1, x_BTD.shape[-1]) for x_BTD in (one.hidden for one in outputs)]
        values = jax.lax.map(of_one, (*flat, targets_BT.reshape(-1)), batch_size=_CHUNK)
        return values.reshape(targets_BT.shape)

    return contrast


def make_largest(
    model: Model, count: int, entries: int, loss: Loss = CROSS_ENTROPY
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(trained, batch) -> the `count` most probable tokens at every position, the first the most.

    Ids are int32 [B, T, count], log-probabilities float32 of the softmax over the whole vocabulary.

    Args:
      model: the model.
      count: how many, at most `entries`.
      entries: ids lie below; the rows of a table that no token has come after.
      loss: that the model was trained with, whose blocks of attention it has.
    """
    forward = make_forward(model, attention_blocks=loss.attention_blocks)

    def largest(trained, batch):
        outputs, head_DV = forward(trained, batch)

        def of_one(hidden_D):
            logits_V = _cap(
                jnp.matmul(hidden_D, head_DV, preferred_element_type=jnp.float32), model
            )
            values, ids = jax.lax.top_k(logits_V[:entries], count)
            return ids, values - jax.nn.logsumexp(logits_V)

        hidden_BTD = outputs.hidden
        flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        found = jax.lax.map(of_one, flat, batch_size=_CHUNK)
        return tuple(x.reshape(*hidden_BTD.shape[:2], count) for x in found)

    return largest


def make_mass(
    model: Model, entries: np.ndarray, loss: Loss = CROSS_ENTROPY
) -> Callable[..., jax.Array]:
    """(trained, batch) -> the probability of all `entries`, bool [V], together: [B, T] float32."""
    forward = make_forward(model, attention_blocks=loss.attention_blocks)

    def mass(trained, batch):
        outputs, head_DV = forward(trained, batch)
        # A table may have rows that no token has.
        chosen_V = jnp.zeros(head_DV.shape[1], bool).at[: len(entries)].set(entries)

        def of_one(hidden_D):
            products_V = jnp.matmul(hidden_D, head_DV, preferred_element_type=jnp.float32)
            return jnp.sum(jax.nn.softmax(_cap(products_V, model)), where=chosen_V)

        hidden_BTD = outputs.hidden
        flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        return jax.lax.map(of_one, flat, batch_size=_CHUNK).reshape(hidden_BTD.shape[:2])

    return mass


def score_documents(
    compute: Callable[[dict[str, np.ndarray]], Any],
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    without_context: bool = False,
) -> Iterator[np.ndarray]:
    """Yields the values of every document of every corpus, in order, [positions, ...].

    A document that is longer than T is cut into pieces of T, each with positions from 0, as
    `data.packing=best_fit` cuts it.

    Args:
      compute: batch -> values [B, T, ...] at the targets, or a tuple of them, of which tuples
        come; positions without a value have NaN, or -1.
      corpora: what is scored.
      tokenizer: turns text into ids.
      batch_size: B; memory holds the documents of one batch.
      sequence_length: T.
      without_context: leave out the spans of weight 0, such as prompts, whose positions get NaN;
        the others keep their places.
    """
    values, done = {}, 0
    for rows in _fill(
        _pieces(corpora, tokenizer, sequence_length, without_context), batch_size, sequence_length
    ):
        made = [make_row([piece.positions for piece in row], sequence_length) for row in rows]
        computed = compute({n: np.stack([row[n] for row in made]) for n in made[0]})
        computed = jax.tree.map(np.asarray, computed)
        for number, row in enumerate(rows):
            start = 0
            for piece in row:
                if piece.document not in values:
                    values[piece.document] = jax.tree.map(
                        lambda x, total=piece.total: _missing(total, x), computed
                    )
                end = start + len(piece.positions)
                kept = piece.places < piece.total
                for own, x in zip(
                    jax.tree.leaves(values[piece.document]), jax.tree.leaves(computed), strict=True
                ):
                    own[piece.places[kept]] = x[number, start:end][kept]
                start = end
        # Pieces come in order: only the last document can go on in the next batch.
        for number in range(done, max(values)):
            yield values.pop(number)
        done = max(values)
    yield from values.values()


def score_across(
    compute: Callable[[dict[str, np.ndarray]], Any],
    corpora: Sequence[Corpus],
    tokenizer: Tokenizer,
    teacher: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    chunks: bool,
    merge: float = 0.0,
) -> Iterator[tuple[np.ndarray]]:
    """Yields what a model of another tokenizer says of every document, in a tuple of one array.

    Args:
      compute: batch of the model's tokens -> [B, T, ...]; with `merge`, and [B, T], the probability
        that a token begins with a space.
      corpora: what is scored.
      tokenizer: whose positions the values are for.
      teacher: of the model.
      batch_size: B.
      sequence_length: T, of the model's tokens.
      chunks: the sum of the values over each piece of text between common byte boundaries, where it
        ends; else the values where a target begins on one. NaN elsewhere. See `lm.data.alignment`.
      merge: a piece ends only where the model gives more than this to a token that begins with a
        space, or at the end of text; 0 is everywhere.

    Raises:
      InputError: a document is a chat.
    """
    options = {"batch_size": batch_size, "sequence_length": sequence_length}
    found = score_documents(compute, corpora, teacher, **options)
    documents = (document for corpus in corpora for document in corpus.documents)
    for document, values in zip(documents, found, strict=True):
        if document.roles or document.framed:
            raise InputError(
                f"{document.name} is a chat, which every tokenizer writes with a template of its "
                "own; valid across tokenizers: text, or prompt and response"
            )
        sizes = [encode_document(document, one)["num_bytes"] for one in (tokenizer, teacher)]
        ends = common_ends(*sizes)
        if merge:
            values, space = values
            # The end of text is the last.
            likely = np.append(space, 1.0)[ends[1] + 1] > merge
            ends = ends[0][likely], ends[1][likely]
        align = chunk_sums if chunks else at_starts
        yield (align(values, ends, len(sizes[0])),)


def score_faults(
    compute: Callable[[dict[str, np.ndarray]], Any],
    corpora: Sequence[Corpus],
    faulty: Corpus,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
) -> Iterator[np.ndarray]:
    """Yields what `fait` compares every document with, in order, float32 [2, positions].

    That is the mask of the targets which the faulty answer to the same prompt lacks, and the mean
    log-probability of the tokens which it has instead, the same number at all positions: of all its
    tokens where it has nothing instead.

    Args:
      compute: batch -> losses [B, T].
      corpora: right answers.
      faulty: an answer to each of their prompts, in any order; held in memory.
      tokenizer: turns text into ids.
      batch_size: B.
      sequence_length: T.

    Raises:
      InputError: a document has no prompt, or its prompt no faulty answer; or a corpus holds
        preferences, of which not every answer is a right, or a faulty, one.
    """
    for corpus in (*corpora, faulty):
        if corpus.preferences:
            raise InputError(
                f"{corpus.name} has records of the kind {corpus.kind}; right and faulty answers "
                "are files of their own, with prompt and response"
            )
    answers = {_prompt(one): one for one in faulty.documents}

    def pair(document):
        prompt = _prompt(document)
        if not prompt or prompt not in answers:
            raise InputError(
                f"{faulty.name} has no answer to the prompt {prompt[:80]!r} of document "
                f"{document.name}; it needs one to each prompt of the corpus"
            )
        return document, answers[prompt]

    pairs, others = itertools.tee(pair(one) for corpus in corpora for one in corpus.documents)
    losses = score_documents(
        compute,
        [faulty._replace(documents=(other for _, other in others))],
        tokenizer,
        batch_size=batch_size,
        sequence_length=sequence_length,
    )
    for one, nll in zip(pairs, losses, strict=True):
        right, wrong = (encode_document(document, tokenizer) for document in one)
        lacks = error_mask(right["targets"], wrong["targets"]) & (right["weights"] != 0)
        answer = wrong["weights"] != 0
        instead = error_mask(wrong["targets"], right["targets"]) & answer
        log_p = -np.mean(nll[instead if instead.any() else answer])
        yield np.stack([lacks, np.full(len(right), log_p)]).astype(np.float32)


def _missing(length: int, like_BT: np.ndarray) -> np.ndarray:
    """Values of a document before any is known."""
    nothing = np.nan if like_BT.dtype.kind == "f" else -1
    return np.full((length, *like_BT.shape[2:]), nothing, like_BT.dtype)


def _prompt(document: Document) -> str:
    return "".join(text for text, weight in document.spans if not weight)


class _Piece(NamedTuple):
    """A part of a document: its number, its positions in all, and where the part's belong.

    A place that is not below `total` is one that the document does not have.
    """

    document: int
    total: int
    positions: np.ndarray
    places: np.ndarray


def _pieces(
    corpora: Sequence[Corpus], tokenizer: Tokenizer, length: int, without_context: bool
) -> Iterator[_Piece]:
    documents = (document for corpus in corpora for document in corpus.documents)
    for number, document in enumerate(documents):
        answers = [rendered(answer, tokenizer) for answer in document.answers]
        encoded = [encode_document(answer, tokenizer) for answer in answers]
        total, first = sum(map(len, encoded)), 0
        for answer, positions in zip(answers, encoded, strict=True):
            places = first + np.arange(len(positions))
            first += len(positions)
            if without_context:
                places = places[positions["weights"] != 0]
                positions = encode_document(_without_context(answer), tokenizer)
                # Where the document ends with context, its end is not the end of the rest.
                places = np.pad(places, (0, len(positions) - len(places)), constant_values=total)
            for start in range(0, len(positions), length):
                cut = slice(start, start + length)
                yield _Piece(number, total, positions[cut], places[cut])


def _without_context(document: Document) -> Document:
    spans = tuple((text, weight) for text, weight in document.spans if weight)
    # The first token of a document that is framed is no target.
    framed = document.framed and bool(document.spans[0][1])
    return document._replace(spans=spans or (("", 0.0),), framed=framed)


def _fill(pieces: Iterator[_Piece], batch_size: int, length: int) -> Iterator[list[list[_Piece]]]:
    """Packs pieces into rows, each into the first of the batch's rows that has room."""
    rows, room = [[] for _ in range(batch_size)], [length] * batch_size
    for piece in pieces:
        size = len(piece.positions)
        free = next((row for row in range(batch_size) if room[row] >= size), None)
        if free is None:
            yield rows
            rows, room, free = [[] for _ in range(batch_size)], [length] * batch_size, 0
        rows[free].append(piece)
        room[free] -= size
    if any(rows):
        yield rows


def _cap(logits: jax.Array, model: Model) -> jax.Array:
    cap = model.config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits
