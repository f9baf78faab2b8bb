"""From text to ids and back: bytes, a byte-pair encoding of the corpus, or any tokenizer.json.

Every token also has the number of UTF-8 bytes of the text that it stands for, so that a loss can be
given in bits per byte, which does not depend on the tokenizer.
"""

import abc
import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm import strict_json
from lm.data import chats, cuts, declared
from lm.data.corpora import cache_directory
from lm.data.documents import Corpus
from lm.data.hashing import fingerprint
from lm.errors import InputError, shown

# Bytes of text that a byte-pair encoding is trained on; a larger corpus is sampled.
_TRAINING_BYTES = 100_000_000

# Arrays are as long as the largest id of a tokenizer.json, which one entry can make as large as it
# likes.
_MOST_IDS = 2**24


class Tokenizer(abc.ABC):
    """Turns text into ids and back. It can be pickled.

    Attributes:
      vocab_size: ids lie in [0, vocab_size), that of the end of text included.
      end_of_text: the id that closes every document; no text is ever encoded to it.
      beginning_of_text: the id that opens every document: one of its own where the tokenizer
        declares it, otherwise `end_of_text`.
      fingerprint: tells this tokenizer from any other; its chat template does not count.
      special_tokens: what a chat template may write as one token; text never becomes one.
      chat_template: the source of its chat template, None for ChatML.
    """

    vocab_size: int
    end_of_text: int
    beginning_of_text: int
    fingerprint: str
    special_tokens: frozenset[str] = frozenset()
    chat_template: str | None = None

    @property
    def chat(self) -> chats.ChatTemplate:
        """The template of its chats.

        Raises:
          InputError: it is no template that can be read.
        """
        return chats.make_template(None, {})

    def special_id(self, text: str) -> int:
        """Returns the id of one of `special_tokens`."""
        raise KeyError(text)

    @abc.abstractmethod
    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and the UTF-8 bytes of `text` that each covers, both int32 [tokens].

        The bytes add up to those of the text; only an empty list of ids, which a tokenizer may
        give for text that it cannot represent, covers none.
        """

    def encode_pieces(self, text: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields what `encode` returns in pieces, in order; joined, they are identical to it.

        A long text is so encoded as far as it is needed, where the tokenizer allows it.
        """
        start = 0
        for end in self._cuts(text):
            yield self.encode(text[start:end])
            start = end
        yield self.encode(text[start:] if start else text)

    def _cuts(self, text: str) -> Iterator[int]:
        """Yields characters at which the text may be cut and encoded on both sides by itself."""
        yield from ()

    @abc.abstractmethod
    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids [tokens] but for ends and beginnings; bad UTF-8 is replaced."""

    def is_byte(self, token: int) -> bool:
        """Returns whether a token is a byte of a vocabulary with byte fallback, such as <0x0A>.

        Its decoder may replace all bytes in a row when a later one does not fit.
        """
        return False


def load(
    tokenizer: str,
    vocab_size: int,
    corpora: tuple[Corpus, ...],
    *,
    directory: str,
    end_of_text: str = "",
    beginning_of_text: str = "",
) -> Tokenizer:
    """Loads a tokenizer, or trains it.

    Args:
      tokenizer: `bytes`: ids are bytes, and 256 is the end of text. `bpe`: a byte-level byte-pair
        encoding of `corpora`, trained on at most 100 MB of text, in whole documents drawn at random
        with a fixed seed. Or the path of a tokenizer.json of the `tokenizers` library.
      vocab_size: the entries of `bpe`, the end of text included; else 0, what the tokenizer has, or
        of a tokenizer.json more, for a table with rows that no token has.
      corpora: the training split; used by `bpe` only.
      directory: where trained tokenizers are cached; "" is `cache_directory("")`.
      end_of_text, beginning_of_text: of a tokenizer.json, see `Subwords`.

    Raises:
      InputError: the name means nothing, the file is no tokenizer or declares no end of text, or
        the vocabulary is too small, or larger than what the corpus can fill.
    """
    if tokenizer == "bpe":
        return _load_bpe(vocab_size, corpora, cache_directory(directory) / "tokenizers")
    if tokenizer == "bytes":
        loaded = Bytes()
    else:
        loaded = _load_file(tokenizer, end_of_text, beginning_of_text)
    room = vocab_size >= loaded.vocab_size and tokenizer != "bytes"
    if vocab_size not in (0, loaded.vocab_size) and not room:
        raise InputError(
            f"data.vocab_size {vocab_size}: the tokenizer {tokenizer!r} has {loaded.vocab_size}"
            " entries; set 0 for that many"
        )
    return loaded


class Bytes(Tokenizer):
    """One id a byte, and 256 as the end of text."""

    vocab_size = 257
    end_of_text = 256
    beginning_of_text = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer`."""
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return ids, np.ones_like(ids)

    def _cuts(self, text: str) -> Iterator[int]:
        return iter(range(cuts.PIECE, len(text), cuts.PIECE))

    def decode(self, ids: np.ndarray) -> str:
        """See `Tokenizer`."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class Subwords(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    The end of text is what is declared: by the arguments, else by eos_token of a
    tokenizer_config.json beside the file, else by the only special token of the tokenizer.json with
    a name that is known for it. Beside special tokens an ordinary entry is never taken for it. The
    beginning of text likewise (bos_token); without one, documents open with the end of text.

    Args:
      definition: the content of its tokenizer.json.
      where: the file, for error messages and the tokenizer_config.json beside it.
      end_of_text, beginning_of_text: tokens; "" is what the files declare, `declared.GUESSED` what
        older commits took.

    Raises:
      InputError: this is no tokenizer, or its end of text is not declared or ambiguous.
    """

    def __init__(
        self, definition: str, where: str, end_of_text: str = "", beginning_of_text: str = ""
    ):
        self.definition = definition
        self._built = None
        try:
            vocabulary = self._tokenizer().get_vocab(with_added_tokens=True)
        except Exception as error:  # The library raises Exception itself.
            raise InputError(
                f"data.tokenizer {where!r}: not a tokenizer.json: {shown(str(error), 200)}"
            ) from error
        if max(vocabulary.values(), default=0) >= _MOST_IDS:
            raise InputError(f"data.tokenizer {where!r}: an id is not below {_MOST_IDS:,}")
        special = [
            token.content
            for token in self._tokenizer().get_added_tokens_decoder().values()
            if token.special
        ]
        config = declared.tokenizer_config(Path(where).with_name("tokenizer_config.json"))
        self.guess = next((name for name in declared.ENDS if name in vocabulary), "")
        if declared.GUESSED in (end_of_text, beginning_of_text) and self.guess:
            end_of_text = beginning_of_text = self.guess
        end = (
            end_of_text
            or declared.content(config.get("eos_token"))
            or declared.end_among(special, vocabulary, where)
        )
        beginning = beginning_of_text or declared.content(config.get("bos_token"))
        known = [name for name in special if name in declared.BEGINNINGS]
        beginning = beginning or (known[0] if len(known) == 1 else end)
        for key, token in (("end_of_text", end), ("beginning_of_text", beginning)):
            if token not in vocabulary:
                near = difflib.get_close_matches(token, special, n=3)
                raise InputError(
                    f"data.{key}={token!r} is not in the vocabulary of {where!r}; its special "
                    f"tokens are: {', '.join(near or special[:20]) or 'none'}"
                )
        self.end_of_text_token, self.beginning_of_text_token = end, beginning
        self.end_of_text, self.beginning_of_text = vocabulary[end], vocabulary[beginning]
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_tokens = frozenset(special)
        self.chat_template = declared.chat_template(where, config)
        self._widths = self._byte_widths(vocabulary)
        self._may_cut = self._widths is not None and cuts.may_be_at_spaces(definition, vocabulary)
        self.fingerprint = fingerprint([definition.encode()])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_built": None}

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return self._tokenizer().get_vocab(with_added_tokens=True)

    @property
    def chat(self) -> chats.ChatTemplate:
        """See `Tokenizer`. The ends of text are the bos_token and eos_token of the template."""
        ends = {"bos_token": self.beginning_of_text_token, "eos_token": self.end_of_text_token}
        return chats.make_template(self.chat_template, ends)

    def special_id(self, text: str) -> int:
        """See `Tokenizer`."""
        return self._tokenizer().token_to_id(text)

    def _tokenizer(self) -> Any:
        if self._built is None:
            import tokenizers

            built = tokenizers.Tokenizer.from_str(self.definition)
            built.no_truncation()
            built.no_padding()
            # Text that spells the end of text is text, and must not end the document.
            built.encode_special_tokens = True
            self._built = built
        return self._built

    def _cuts(self, text: str) -> Iterator[int]:
        return cuts.at_spaces(text) if self._may_cut else iter(())

    def _byte_widths(self, vocabulary: dict[str, int]) -> np.ndarray | None:
        """Returns the bytes of each id [V], where these do not depend on the text around it."""
        definition = json.loads(self.definition)
        decoder = definition.get("decoder") or {}
        if decoder.get("type") != "ByteLevel" or definition.get("normalizer"):
            return None
        widths = np.zeros(self.vocab_size, np.int32)
        for token, index in vocabulary.items():
            widths[index] = len(token)  # A byte-level vocabulary spells each byte as a character.
        for index, token in self._tokenizer().get_added_tokens_decoder().items():
            widths[index] = len(token.content.encode())
        return widths

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer`."""
        if self._widths is not None:
            # Half the time of `encode`, as it does not keep track of offsets.
            (encoding,) = self._tokenizer().encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoding.ids, np.int32)
            num_bytes = self._widths[ids]
            # A tokenizer may put a space before the text, or lack a byte.
            if num_bytes.sum() == len(text.encode()):
                return ids, num_bytes
        encoding = self._tokenizer().encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        if not len(ids):
            return ids, ids
        # A token covers what lies between the furthest end so far and its own end, so that white
        # space that a tokenizer trims off its offsets, and characters that it spreads over
        # several tokens, are counted exactly once.
        ends = np.maximum.accumulate(np.array(encoding.offsets, np.int64)[:, 1])
        ends[-1] = len(text)
        return ids, np.diff(_byte_offsets(text)[ends], prepend=0).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """See `Tokenizer`."""
        ids = np.asarray(ids)
        kept = ids[(ids != self.end_of_text) & (ids != self.beginning_of_text)].tolist()
        return self._tokenizer().decode(kept, skip_special_tokens=False)

    def is_byte(self, token: int) -> bool:
        """See `Tokenizer`."""
        name = self._tokenizer().id_to_token(token) or ""
        return re.fullmatch("<0x[0-9A-F]{2}>", name) is not None


def _byte_offsets(text: str) -> np.ndarray:
    """Returns the UTF-8 byte where each character starts, and the end: int64 [characters + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


def _load_file(name: str, end_of_text: str, beginning_of_text: str) -> Tokenizer:
    path = Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(name, ["bytes", "bpe"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"data.tokenizer {name!r}: no such file; valid are bytes, bpe or the path of a"
            f" tokenizer.json{hint}"
        )
    definition = path.read_text(encoding="utf-8", errors="replace")
    return Subwords(definition, str(path), end_of_text, beginning_of_text)


def _load_bpe(vocab_size: int, corpora: tuple[Corpus, ...], directory: Path) -> Tokenizer:
    if vocab_size < 257:
        raise InputError(
            f"data.vocab_size {vocab_size}: a bpe tokenizer needs at least 257, for all bytes and"
            " the end of text"
        )
    import tokenizers

    settings = [tokenizers.__version__, cuts.PATTERN, _TRAINING_BYTES, vocab_size]
    settings += [corpus.fingerprint for corpus in corpora]
    key = fingerprint([strict_json.dumps(settings).encode()])
    path = directory / f"bpe{vocab_size}_{key[:16]}" / "tokenizer.json"
    if not path.is_file():
        _write(path, _train(vocab_size, corpora))
    return Subwords(path.read_text(encoding="utf-8"), str(path))


def _train(vocab_size: int, corpora: tuple[Corpus, ...]) -> str:
    """Returns the tokenizer.json of a byte-pair encoding; the same for the same arguments."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    # Said outright, as it is the default: the library warns of any later fork otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(cuts.PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[declared.END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpora), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise InputError(
            f"data.vocab_size {vocab_size}: data.corpus has only enough text for"
            f" {tokenizer.get_vocab_size()} entries"
        )
    return tokenizer.to_str()


def _sample(corpora: tuple[Corpus, ...]) -> Iterator[str]:
    """Yields documents of all corpora in random order, up to the limit of bytes."""
    ends = np.cumsum([len(corpus.documents) for corpus in corpora])
    left = _TRAINING_BYTES
    for index in np.random.default_rng(0).permutation(ends[-1]):
        number = int(np.searchsorted(ends, index, side="right"))
        corpus = corpora[number]
        text = corpus.documents[int(index - ends[number]) + len(corpus.documents)].text
        yield text
        left -= len(text)
        if left < 0:
            return


def _write(path: Path, content: str) -> None:
    """Writes a file that is either whole or not there, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
    ) as file:
        file.write(content)
    os.replace(file.name, path)
