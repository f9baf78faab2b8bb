"""Tokenizers in GGUF files: the same ids as the tokenizer.json that they come from."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from lm.data.tokenizers import Subwords
from lm.errors import InputError
from lm.pretrained.gguf_tokenizer import tokenizer_files

CORPUS = [
    "The model's 12 layers don't know 2024 or 31415, they'll see  two   spaces\n\n and lines.\r\n",
    "def f(x, y):\n    return x + y  # größer, naïve, 日本語のテキスト, Привет мир\n",
    "I'VE said: WE'RE here!! (really?) http://example.org/a_b-c \t\ttabs",
] * 3

# Written as in the tokenizer.json of Llama 3, of Qwen2 and of SmolLM.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )


PRE = {
    "default": lambda: pre_tokenizers.ByteLevel(False),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    ),
    "llama-bpe": lambda: split(LLAMA3),
    "qwen2": lambda: split(QWEN2),
}


def train(pre: str) -> tokenizers.Tokenizer:
    """A byte-level encoding of `CORPUS` with up to 600 tokens and two special ones."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer, made.decoder = PRE[pre](), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([tokenizers.AddedToken("<turn>", normalized=False)])
    return made


def metadata(made: tokenizers.Tokenizer, cut: str, **changes):
    """Its parts as a GGUF file has them; `changes` by the last part of a key, None leaves out."""
    model = json.loads(made.to_str())["model"]
    vocabulary = made.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = {"<s>": 3, "</s>": 3, "<turn>": 4}
    parts = {
        "model": "gpt2",
        "pre": cut,
        "tokens": tokens,
        "token_type": np.array([kinds.get(token, 1) for token in tokens], np.int32),
        "merges": [" ".join(merge) for merge in model["merges"]],
        "eos_token_id": vocabulary["</s>"],
        "bos_token_id": vocabulary["<s>"],
    } | changes
    return {f"tokenizer.ggml.{key}": part for key, part in parts.items() if part is not None}


def build(folder, found, where="x.gguf") -> Subwords:
    for name, content in tokenizer_files(found, where).items():
        (folder / name).write_text(content)
    return Subwords((folder / "tokenizer.json").read_text(), str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def originals():
    return {pre: train(pre) for pre in PRE}


@pytest.mark.parametrize("pre", PRE)
def test_ids_are_those_of_the_original(pre, originals, tmp_path):
    original, found = originals[pre], build(tmp_path, metadata(originals[pre], pre))
    original.encode_special_tokens = True
    assert (found.end_of_text, found.beginning_of_text) == (1, 0)
    assert found.vocabulary() == original.get_vocab(with_added_tokens=True)
    assert found.special_tokens == {"<s>", "</s>"}
    words = st.sampled_from([*" \n\t\r'09aé", "'LL", "12345", " the", "</s>", "<turn>", "e\u0301"])

    @given(st.lists(words | st.text(max_size=6), max_size=12).map("".join))
    @settings(max_examples=100, deadline=None)
    def compare(text):
        ids, _ = found.encode(text)
        assert ids.tolist() == original.encode(text, add_special_tokens=False).ids

    compare()
    for text in CORPUS[:3]:
        compare.hypothesis.inner_test(text)
        assert found.decode(found.encode(text)[0]) == text


def test_ways_to_cut_text_differ(originals, tmp_path):
    """What keeps the test above from passing with one way for all."""
    ids = set()
    for pre in PRE:
        (tmp_path / pre).mkdir()
        changed = metadata(originals["gpt-2"], pre)
        text = " 2024 I'VE 31415)\n\n\n  x e\u0301"
        ids.add(tuple(build(tmp_path / pre, changed).encode(text)[0]))
    assert len(ids) == len(PRE) - 1  # "default" and "gpt-2" are one.


def test_a_chat_template_comes_with_the_tokenizer_byte_for_byte(originals, tmp_path):
    template = "{{ bos_token }}\r\n{{ 'ü' }}"
    found = metadata(originals["gpt-2"], "gpt-2") | {"tokenizer.chat_template": template}
    assert tokenizer_files(found, "x.gguf")["chat_template.jinja"] == template
    found["tokenizer.chat_template"] = 3
    assert "chat_template.jinja" not in tokenizer_files(found, "x.gguf")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model='llama' is not known; valid: 'gpt2'"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"model": 3}, "tokenizer.ggml.model is missing or of another type"),
        ({"pre": "tekken\n"}, r"tokenizer.ggml.pre='tekken\n' is not known; valid: default,"),
        ({"pre": 3}, "tokenizer.ggml.pre is missing or of another type"),
        ({"tokens": np.arange(9)}, "tokenizer.ggml.tokens is missing or of another type"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing or of another type"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens has a token twice"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": np.arange(3)}, "tokenizer.ggml.merges is missing or of another type"),
        ({"merges": ["a qqqq"]}, "tokenizer.ggml.merges: 'a qqqq' has no token"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges: 'ab' has no token"),
        ({"merges": [" "]}, "has no token"),
        ({"token_type": np.ones(3, np.int32)}, "token_type has 3 entries for "),
        ({"token_type": np.ones(3, np.float32)}, "token_type must be whole numbers"),
        ({"token_type": ["a"]}, "token_type is missing or of another type"),
        ({"token_type": 1}, "token_type is missing or of another type"),
        ({"eos_token_id": 100_000}, "eos_token_id=100000 is not the id of one of "),
        ({"eos_token_id": -1}, "eos_token_id=-1"),
        ({"bos_token_id": True}, "bos_token_id=True"),
        ({"bos_token_id": "1"}, "bos_token_id='1'"),
    ],
    ids=range(21),
)
def test_parts_that_do_not_fit_together_are_refused(changes, expected, originals):
    found = metadata(originals["gpt-2"], "gpt-2", **changes)
    with pytest.raises(InputError) as caught:
        tokenizer_files(found, "some/x.gguf")
    line = str(caught.value)
    assert expected in line
    assert line.startswith("some/x.gguf: ")
    assert line.isprintable()


def test_without_types_of_tokens_no_token_is_special(originals):
    files = tokenizer_files(metadata(originals["gpt-2"], "gpt-2", token_type=None), "x.gguf")
    assert json.loads(files["tokenizer.json"])["added_tokens"] == []
