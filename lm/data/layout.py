"""From a document to the arrays of a row.

A document of tokens t1..tn has the inputs [beginning, t1..tn] and the targets [t1..tn, end]: every
target lies inside the document, and so does all that it is predicted from. A chat has
its beginning and end from the template, where that writes special tokens: the inputs are then
[t1..tn-1] and the targets [t2..tn].
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lm.data import chats
from lm.data.documents import Document, SpecialToken
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError

# One position. A document is one array of these, so that it is cut and packed as a whole.
POSITION = np.dtype(
    [
        ("tokens", np.int32),
        ("targets", np.int32),
        ("weights", np.float32),
        ("num_bytes", np.int32),
    ]
)

# The arrays of every batch. `sample_ids` is the index of the document that a position comes from,
# `sample_positions` its place in that document, which `positions` is not after a cut.
BATCH = {name: POSITION[name] for name in POSITION.names} | {
    "segment_ids": np.dtype(np.int32),
    "positions": np.dtype(np.int32),
    "sample_ids": np.dtype(np.int32),
    "sample_positions": np.dtype(np.int32),
}

# The further arrays of a batch of a policy gradient, see `lm.rollouts.policy_rows`.
POLICY = {
    "advantages": np.dtype(np.float32),
    "rewards": np.dtype(np.float32),
    "behaviour_log_probability": np.dtype(np.float32),
    "behaviour_entropy": np.dtype(np.float32),
    "group_divergence": np.dtype(np.float32),
    "group_ids": np.dtype(np.int32),
    "old_log_probability": np.dtype(np.float32),
    "temperatures": np.dtype(np.float32),
}

# Those of them that only the batches of an objective have which asks for them.
OPTIONAL = ("old_log_probability", "temperatures")

# What an array holds in the padding, where that is not 0.
PADDING = {"sample_ids": -1, "pair_ids": -1, "mismatched_ids": -1, "group_ids": -1}


def encode_document(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """Returns a document as positions: an array of `POSITION` [n + 1], n its number of tokens.

    The end of text covers no bytes and has the weight of the last span; special tokens of a chat
    cover no bytes. A document that is framed has n - 1 positions.

    Raises:
      InputError: the tokenizer gives an id outside its own vocabulary.
    """
    return np.concatenate(list(encode_pieces(document, tokenizer)))


def encode_pieces(document: Document, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields what `encode_document` returns in pieces, none of them empty.

    A long document is tokenized as far as its positions are asked for, where the tokenizer allows
    that.

    Raises:
      InputError: the tokenizer gives an id outside its own vocabulary.
    """
    document = rendered(document, tokenizer)
    before = None if document.framed else tokenizer.beginning_of_text
    for text, weight in document.spans:
        for ids, num_bytes in _encoded(text, tokenizer):
            if before is None and len(ids):
                before, ids, num_bytes = ids[0], ids[1:], num_bytes[1:]
            if not len(ids):
                continue
            if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
                raise InputError(
                    f"data.tokenizer: gives ids from {ids.min()} to {ids.max()} for document"
                    f" {document.name}; its vocabulary has {tokenizer.vocab_size} entries"
                )
            positions = np.zeros(len(ids), POSITION)
            positions["tokens"][0] = before
            positions["tokens"][1:] = ids[:-1]
            positions["targets"] = ids
            positions["weights"] = weight
            positions["num_bytes"] = num_bytes
            before = ids[-1]
            yield positions
    if document.framed:
        if before is None:
            raise InputError(f"{document.name}: the chat template writes nothing")
        return
    last = np.zeros(1, POSITION)
    last["tokens"], last["targets"] = before, tokenizer.end_of_text
    last["weights"] = document.spans[-1][1]
    yield last


def rendered(document: Document, tokenizer: Tokenizer) -> Document:
    """Returns a chat as its tokenizer's template writes it, any other document as it is.

    The spans of the result are the whole text, special tokens as spans of their own. It is framed
    where there are special tokens; markers that are ordinary text stand between a beginning and an
    end of text, as all text does.

    Raises:
      InputError: the template cannot render the chat, or the answers cannot be told from the rest.
    """
    if not document.roles:
        return document
    contents, weights = zip(*document.spans, strict=True)
    messages = list(map(chats.Message, document.roles, contents))
    spans = chats.spans(tokenizer.chat, messages, tokenizer.special_tokens, document.name, weights)
    framed = any(isinstance(text, SpecialToken) for text, _ in spans)
    return Document(document.name, spans, framed=framed)


def encode_prompt(messages: Sequence[chats.Message], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids [n] int32 that a chat's next answer follows.

    Raises:
      InputError: the template cannot render the messages.
    """
    spans = chats.prompt_spans(tokenizer.chat, messages, tokenizer.special_tokens, "chat")
    ids = [ids for text, _ in spans for ids, _ in _encoded(text, tokenizer)]
    if not any(isinstance(text, SpecialToken) for text, _ in spans):
        ids.insert(0, np.array([tokenizer.beginning_of_text], np.int32))
    return np.concatenate(ids).astype(np.int32)


def _encoded(text: str, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if isinstance(text, SpecialToken):
        return iter([(np.array([tokenizer.special_id(text)], np.int32), np.zeros(1, np.int32))])
    return tokenizer.encode_pieces(text)


def add_fields(positions: np.ndarray, **fields: np.ndarray | np.generic) -> np.ndarray:
    """Returns the same positions with more fields, which are cut and packed along with the rest.

    Args:
      positions: structured array [n].
      **fields: for each new field an array [n], or [n, K] of K values a position, or a number for
        all positions, of the field's type.
    """
    arrays = ((name, np.asarray(values)) for name, values in fields.items())
    new = [(name, array.dtype, array.shape[1:]) for name, array in arrays]
    wider = np.empty(len(positions), positions.dtype.descr + new)
    for name in positions.dtype.names:
        wider[name] = positions[name]
    for name, values in fields.items():
        wider[name] = values
    return wider


def make_row(pieces: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Returns one row: `pieces` of documents after each other, then padding.

    Args:
      pieces: arrays of `POSITION`, with the same further fields in each, together at most `length`
        long, none of them empty.
      length: T.

    Returns:
      tokens, targets, segment_ids, positions and num_bytes int32 [T]; weights float32 [T]; and the
      further fields, [T] or [T, K]. Segments count from 1, positions from 0 in each; in the
      padding all arrays are 0 but for those of `PADDING`.
    """
    row = np.zeros(length, pieces[0].dtype if pieces else POSITION)
    for name in PADDING.keys() & set(row.dtype.names):
        row[name] = PADDING[name]
    segment_ids = np.zeros(length, np.int32)
    positions = np.zeros(length, np.int32)
    start = 0
    for segment, piece in enumerate(pieces, 1):
        end = start + len(piece)
        row[start:end] = piece
        segment_ids[start:end] = segment
        positions[start:end] = np.arange(len(piece))
        start = end
    arrays = {name: np.ascontiguousarray(row[name]) for name in row.dtype.names}
    return arrays | {"segment_ids": segment_ids, "positions": positions}
