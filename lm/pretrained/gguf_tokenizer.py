"""Tokenizers from the metadata of a GGUF file, as a tokenizer.json of the library `tokenizers`.

Two kinds are built, by `tokenizer.ggml.model`:

- "gpt2", byte-level BPE with its merges. `tokenizer.ggml.pre` names how text is split before it;
  the expressions are those of llama.cpp (src/llama-vocab.cpp) in the form that the models' own
  tokenizer.json files have.
- "llama", SentencePiece BPE. A file has the scores of its tokens in place of merges: a pair of
  tokens is merged in order of the score of the token that it makes.

Tokens that the file calls control or unknown, and the first and last of a sequence, become special;
tokens defined by the user are found whole in the text, too, but are not special. Neither kind adds
a first or last token to a text by itself. The metadata are untrusted.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lm.errors import InputError

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPECIAL = (_UNKNOWN, _CONTROL)
_MERGED = (_NORMAL, _USER_DEFINED, _UNUSED)
_SPACE = "▁"
_MAX_CHARACTERS = 512  # Of a token whose splits are tried; real ones have fewer than 100.

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Split(NamedTuple):
    """How text is split before byte-level BPE.

    Attributes:
      pattern: of the pieces; "" for that of GPT-2, which `tokenizers` has built in.
      digits: every digit is a piece, before the pattern is applied.
      ignore_merges: a piece that is a token is not built from merges.
      composed: text is put into Unicode's form NFC first.
    """

    pattern: str = ""
    digits: bool = False
    ignore_merges: bool = False
    composed: bool = False


_SPLITS = {
    "default": _Split(),
    "gpt-2": _Split(),
    "smollm": _Split(digits=True),
    "llama-bpe": _Split(_LLAMA3, ignore_merges=True),
    "llama3": _Split(_LLAMA3, ignore_merges=True),
    "llama-v3": _Split(_LLAMA3, ignore_merges=True),
    "dbrx": _Split(_LLAMA3),
    "qwen2": _Split(_QWEN2, composed=True),
    "tekken": _Split(_TEKKEN, ignore_merges=True),
}


class _Vocabulary(NamedTuple):
    """The tokens of a file in order of their ids, and the type of each."""

    tokens: list[str]
    types: list[int]

    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def tokenizer_json(metadata: Mapping[str, Any], where: str) -> str:
    """The content of a tokenizer.json that gives every token the id that it has in the file.

    Args:
      metadata: of `lm.pretrained.gguf_file.read_gguf`.
      where: the file, for messages.

    Raises:
      InputError: the kind of tokenizer or of its splitting is not supported, or what the file says
        of its tokens does not fit together.
    """
    kind = _get(metadata, "model", str, where)
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{where}: tokenizer.ggml.model {kind[:60]!r}; valid are gpt2 and llama")
    vocabulary = _vocabulary(metadata, where)
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, vocabulary, where)
    else:
        vocabulary = _respelled(metadata, vocabulary, where)
        tokenizer = _sentencepiece(metadata, vocabulary, where)
    _add_tokens(tokenizer, vocabulary, special_tokens(metadata, where))
    return tokenizer.to_str()


def special_tokens(metadata: Mapping[str, Any], where: str = "GGUF metadata") -> dict[str, str]:
    """The tokens "bos" and "eos", which begin and end a sequence; those that the file names.

    Raises:
      InputError: an id is not that of a token.
    """
    found = {}
    for name in ("bos", "eos"):
        index = _get(metadata, f"{name}_token_id", int, where, optional=True)
        if index is not None:
            found[name] = _token(metadata, f"{name}_token_id", index, where)
    return found


def chat_template(metadata: Mapping[str, Any], where: str = "GGUF metadata") -> str | None:
    """The Jinja template of a conversation, as text; None where the file has none.

    Raises:
      InputError: it is not a string.
    """
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{where}: tokenizer.chat_template must be a string")
    return template


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = _get(metadata, "pre", str, where, optional=True) or "default"
    if name not in _SPLITS:
        near = difflib.get_close_matches(name[:60], _SPLITS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        valid = ", ".join(_SPLITS)
        raise InputError(f"{where}: tokenizer.ggml.pre {name[:60]!r}; valid are {valid}{hint}")
    split = _SPLITS[name]
    ids = vocabulary.ids()
    merges = _merges(metadata, ids, where)
    model = models.BPE(vocab=ids, merges=merges, ignore_merges=split.ignore_merges)
    tokenizer = Tokenizer(model)
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(split: _Split) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    return pre_tokenizers.Sequence(steps)


def pre_of(definition: Mapping[str, Any]) -> str | None:
    """The tokenizer.ggml.pre of a byte-level tokenizer.json; None where none splits text so.

    Args:
      definition: the content of a tokenizer.json.
    """
    from tokenizers import Tokenizer, models

    model = definition["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    normal = (definition.get("normalizer") or {}).get("type")
    for name, split in _SPLITS.items():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = _pre_tokenizer(split)
        its = json.loads(made.to_str())["pre_tokenizer"]
        same = _steps(definition["pre_tokenizer"]) == _steps(its)
        merges = bool(model.get("ignore_merges")) == split.ignore_merges
        if same and merges and normal == ("NFC" if split.composed else None):
            return name
    return None


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer without what does not change ids."""
    found = pre_tokenizer or {}
    steps = found.get("pretokenizers", [found])
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = vocabulary.ids()
    if "tokenizer.ggml.merges" in metadata:
        merges = _merges(metadata, ids, where)
    else:
        merges = _scored_merges(_scores(metadata, vocabulary, where), vocabulary, where)
    unknown = _get(metadata, "unknown_token_id", int, where, optional=True)
    if unknown is not None:
        unknown = _token(metadata, "unknown_token_id", unknown, where)
    model = models.BPE(
        vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = _get(metadata, "add_space_prefix", bool, where, optional=True) is not False
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), replace] if prefix else [replace]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _add_tokens(tokenizer: Any, vocabulary: _Vocabulary, ends: Mapping[str, str]) -> None:
    """Adds the tokens that are found whole in a text, in order of their ids."""
    from tokenizers import AddedToken

    added = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        special = kind in _SPECIAL or token in ends.values()
        if token and (special or kind == _USER_DEFINED):
            added.append(AddedToken(token, normalized=False, special=special))
    tokenizer.add_tokens(added)


def _vocabulary(metadata: Mapping[str, Any], where: str) -> _Vocabulary:
    tokens = _strings(metadata, "tokens", where)
    if not tokens:
        raise InputError(f"{where}: tokenizer.ggml.tokens is empty")
    if len(set(tokens)) < len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.tokens has the same token more than once")
    types = [_NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = _numbers(metadata, "token_type", "iu", len(tokens), where).tolist()
    return _Vocabulary(tokens, types)


def _respelled(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> _Vocabulary:
    """Runs of spaces in their spelling inside the model; Gemma's files have them as spaces.

    They come from merges then, and need not be found whole in the text.
    """
    if not _is_gemma(metadata):
        return vocabulary
    spaces = [not token.strip(" ") and len(token) > 0 for token in vocabulary.tokens]
    tokens = [
        _SPACE * len(token) if space else token
        for token, space in zip(vocabulary.tokens, spaces, strict=True)
    ]
    if len(set(tokens)) < len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.tokens has the same run of spaces twice")
    types = [
        _NORMAL if space else kind for kind, space in zip(vocabulary.types, spaces, strict=True)
    ]
    return _Vocabulary(tokens, types)


def _is_gemma(metadata: Mapping[str, Any]) -> bool:
    return str(metadata.get("general.architecture", "")).startswith("gemma")


def _scores(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> list[float]:
    """How early each token is made, more is earlier."""
    if _is_gemma(metadata):  # The order of its tokens is that of its merges, not their scores.
        return [-float(index) for index in range(len(vocabulary.tokens))]
    scores = _numbers(metadata, "scores", "f", len(vocabulary.tokens), where)
    if not np.isfinite(scores).all():
        raise InputError(f"{where}: tokenizer.ggml.scores must be finite")
    return scores.tolist()


def _scored_merges(
    scores: list[float], vocabulary: _Vocabulary, where: str
) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the highest score first.

    Ties are broken as `transformers` does when it converts a SentencePiece model.
    """
    merged = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.types, scores, strict=True)
        if kind in _MERGED
    }
    found = []
    for token, score in merged.items():
        if len(token) > _MAX_CHARACTERS:
            raise InputError(
                f"{where}: tokenizer.ggml.tokens has a token of {len(token)} characters; valid are"
                f" {_MAX_CHARACTERS} at most"
            )
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in merged and pair[1] in merged]
        found += [(score, len(left), len(right), left, right) for left, right in known]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in found]


def _merges(
    metadata: Mapping[str, Any], ids: Mapping[str, int], where: str
) -> list[tuple[str, str]]:
    merges = []
    for index, line in enumerate(_strings(metadata, "merges", where)):
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise InputError(
                f"{where}: tokenizer.ggml.merges[{index}] {line[:60]!r} must be two tokens with a"
                " space between them"
            )
        for token in (*parts, "".join(parts)):
            if token not in ids:
                raise InputError(
                    f"{where}: tokenizer.ggml.merges[{index}] {line[:60]!r} needs the token"
                    f" {token[:60]!r}, which is not in tokenizer.ggml.tokens"
                )
        merges.append((parts[0], parts[1]))
    return merges


def _token(metadata: Mapping[str, Any], name: str, index: int, where: str) -> str:
    tokens = _strings(metadata, "tokens", where)
    if not 0 <= index < len(tokens):
        raise InputError(
            f"{where}: tokenizer.ggml.{name} is {index}; valid are 0 to {len(tokens) - 1}"
        )
    return tokens[index]


def _get(
    metadata: Mapping[str, Any], name: str, kind: type, where: str, optional: bool = False
) -> Any:
    """The value of tokenizer.ggml.NAME, of exactly this type; None if it may be missing and is."""
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if value is None and optional:
        return None
    if type(value) is not kind:
        got = "nothing" if value is None else type(value).__name__
        raise InputError(f"{where}: {key} must be of type {kind.__name__}, got {got}")
    return value


def _strings(metadata: Mapping[str, Any], name: str, where: str) -> list[str]:
    values = _get(metadata, name, list, where)
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: tokenizer.ggml.{name} must be a list of strings")
    return values


def _numbers(
    metadata: Mapping[str, Any], name: str, kinds: Iterable[str], count: int, where: str
) -> np.ndarray:
    """A list of `count` numbers, of the kinds of NumPy's types ("i", "u" or "f")."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or values.ndim != 1:
        raise InputError(f"{where}: tokenizer.ggml.{name} must be a list of numbers")
    if len(values) != count:
        raise InputError(
            f"{where}: tokenizer.ggml.{name} has {len(values)} values for {count} tokens"
        )
    return values
