"""The tokenizer in the metadata of a GGUF file, as files of a Hugging Face folder."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lm import strict_json
from lm.data import declared
from lm.errors import InputError, shown

# How text is cut before byte pairs are merged, by tokenizer.ggml.pre. Regular expressions as in the
# tokenizer.json of GPT-2, Llama 3 and Qwen2; SmolLM cuts digits apart and then as GPT-2.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT2 = [{**_BYTES, "use_regex": True}]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> list[dict[str, Any]]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, {**_BYTES, "use_regex": False}]


_PRE = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": [{"type": "Digits", "individual_digits": True}, *_GPT2],
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}

_CONTROL, _UNKNOWN, _USER = 3, 2, 4


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """Name -> content of tokenizer.json, tokenizer_config.json and the chat template.

    Raises:
      InputError: a kind of tokenizer that is not known, or lists that do not fit together.
    """

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{where}: tokenizer.ggml.{key} is missing or of another type")
        return value

    model = get("model", str)
    if model != "gpt2":
        raise InputError(
            f"{where}: tokenizer.ggml.model={shown(repr(model), 40)} is not known; valid: "
            "'gpt2' (byte-level byte pairs); take the model's Hugging Face folder"
        )
    pre = get("pre", str, "default")
    if pre not in _PRE:
        raise InputError(
            f"{where}: tokenizer.ggml.pre={shown(repr(pre), 40)} is not known; valid: "
            f"{', '.join(_PRE)}; take the model's Hugging Face folder"
        )
    tokens, merges = get("tokens", list), get("merges", list)
    kinds = get("token_type", np.ndarray, np.ones(len(tokens), np.int32))
    if kinds.dtype.kind not in "iu":
        raise InputError(f"{where}: tokenizer.ggml.token_type must be whole numbers")
    kinds = kinds.tolist()
    _check(tokens, kinds, merges, where)
    ends = {}
    for name, short in (("eos_token", "eos"), ("bos_token", "bos")):
        index = metadata.get(f"tokenizer.ggml.{short}_token_id")
        if index is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise InputError(
                    f"{where}: tokenizer.ggml.{short}_token_id={shown(repr(index), 40)} is not "
                    f"the id of one of {len(tokens):,} tokens"
                )
            ends[name] = tokens[index]
    files = {
        "tokenizer.json": strict_json.dumps(_definition(tokens, kinds, merges, pre)),
        "tokenizer_config.json": strict_json.dumps(ends),
    }
    template = metadata.get("tokenizer.chat_template")
    return files | ({declared.CHAT_TEMPLATE: template} if isinstance(template, str) else {})


def _check(tokens: list, kinds: list[int], merges: list, where: str) -> None:
    known = set(tokens)
    if len(known) != len(tokens):
        raise InputError(f"{where}: tokenizer.ggml.tokens has a token twice")
    if len(kinds) != len(tokens):
        raise InputError(
            f"{where}: tokenizer.ggml.token_type has {len(kinds):,} entries for {len(tokens):,} "
            "tokens"
        )
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or not {left, right, left + right} <= known:
            raise InputError(f"{where}: tokenizer.ggml.merges: {shown(merge)!r} has no token")


def _definition(tokens: list[str], kinds: list[int], merges: list[str], pre: str) -> dict[str, Any]:
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[index] != _USER,
        }
        for index, token in enumerate(tokens)
        if kinds[index] in (_CONTROL, _UNKNOWN, _USER)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[pre]},
        "post_processor": None,
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
