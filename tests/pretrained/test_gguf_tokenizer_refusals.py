"""Metadata of a GGUF tokenizer that do not fit are refused; any others are built."""

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf_tokenizer import ORIGINALS, SENTENCEPIECE, byte_level_metadata
from tokenizers import Tokenizer

from lm.errors import InputError
from lm.pretrained.gguf_tokenizer import tokenizer_json

G, S = "gpt2", "llama"
REFUSED = {
    "unigram": (G, {"model": "t5"}, "model 't5'; valid are gpt2 and llama"),
    "no model": (G, {"model": None}, "model must be of type str, got nothing"),
    "split": (G, {"pre": "qwen-2"}, "pre 'qwen-2'; valid are default, gpt-2, smollm, llama-bpe"),
    "near": (G, {"pre": "qwen-2"}, "did you mean 'qwen2'?"),
    "split's type": (G, {"pre": 3}, "pre must be of type str"),
    "no tokens": (G, {"tokens": None}, "tokens must be of type list, got nothing"),
    "empty": (G, {"tokens": []}, "tokens is empty"),
    "numbers": (G, {"tokens": np.arange(5)}, "tokens must be of type list, got ndarray"),
    "no strings": (G, {"tokens": ["a", []]}, "tokens must be a list of strings"),
    "twice": (G, {"tokens": ["a", "a"]}, "the same token more than once"),
    "no merges": (G, {"merges": None}, "merges must be of type list"),
    "merge": (G, {"merges": ["ab"]}, "merges[0] 'ab' must be two tokens"),
    "three": (G, {"merges": ["a b c"]}, "merges[0] 'a b c' must be two tokens"),
    "half": (G, {"merges": [" b"]}, "must be two tokens"),
    "unknown": (G, {"merges": ["t ☃"]}, "needs the token '☃', which is not in"),
    "joined": (G, {"merges": ["z q"]}, "needs the token 'zq', which is not in"),
    "types": (G, {"token_type": np.ones(3, np.int32)}, "token_type has 3 values for"),
    "types' type": (G, {"token_type": ["a"]}, "token_type must be a list of numbers"),
    "floats": (G, {"token_type": np.ones(3)}, "token_type must be a list of numbers"),
    "eos": (G, {"eos_token_id": 9999}, "eos_token_id is 9999; valid are 0 to"),
    "bos": (S, {"bos_token_id": -1}, "bos_token_id is -1; valid are 0 to"),
    "bos's type": (S, {"bos_token_id": "<s>"}, "bos_token_id must be of type int, got str"),
    "unknown token": (S, {"unknown_token_id": 2**63}, "unknown_token_id is 9223372036854775808"),
    "no scores": (S, {"scores": None}, "scores must be a list of numbers"),
    "scores": (S, {"scores": np.zeros(2, np.float32)}, "scores has 2 values for"),
    "prefix": (S, {"add_space_prefix": 1}, "add_space_prefix must be of type bool"),
    "long": (
        S,
        {"tokens": ["x" * 600], "token_type": np.ones(1, int), "scores": np.zeros(1)},
        "a token of 600 characters; valid are 512 at most",
    ),
    "not finite": (
        S,
        {"tokens": ["a"], "token_type": np.ones(1, int), "scores": np.array([np.nan])},
        "scores must be finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name):
    kind, changes, reason = REFUSED[name]
    metadata = byte_level_metadata(ORIGINALS["default"], "default")
    metadata = dict(metadata if kind == G else SENTENCEPIECE[True])
    for key, value in changes.items():
        metadata[f"tokenizer.ggml.{key}"] = value
        if value is None:
            del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(InputError) as caught:
        tokenizer_json(metadata, "x.gguf")
    message = str(caught.value)
    assert message.startswith("x.gguf: tokenizer.ggml.")
    assert reason in message
    assert "\n" not in message


JUNK = [
    *(
        None,
        True,
        -1,
        0,
        2**70,
        1.5,
        "",
        "gpt2",
        "llama",
        "qwen2",
        b"x",
        [],
        [""],
        ["a", "b", "a b"],
    ),
    *(["a", "", " "], [[]], ["a b", "b"], {}, np.zeros(0), np.zeros((2, 2)), np.full(3, np.inf)),
    *(np.array([1, 3, 4]), np.array([7, -1, 255]), np.float32(1), ["\x00", "▁", "\n"]),
]


@pytest.mark.parametrize("kind", tiny.mostly_slow([G, S], (G,)))
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_other_metadata_are_built_or_refused(kind, data):
    metadata = SENTENCEPIECE[True]
    if kind == G:
        metadata = byte_level_metadata(ORIGINALS["default"], "default")
    changes = st.dictionaries(st.sampled_from(list(metadata)), st.sampled_from(JUNK), max_size=4)
    try:
        content = tokenizer_json(metadata | data.draw(changes), "x.gguf")
    except InputError as error:
        message = str(error)
    else:
        message = ""
        Tokenizer.from_str(content).encode("a b\n")
    assert "\n" not in message
