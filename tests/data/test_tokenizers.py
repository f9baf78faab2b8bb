import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.data import tokenizers as library
from lm.data.documents import Corpus, Document
from lm.errors import InputError

_CODE = (
    "def f(x):\n    if x > 100:\n\t\treturn [x, 'naïve — ☃ 🎉', 2024]\n\n\n        # more\n" * 20
)


def _corpus(*texts):
    documents = [Document(str(i), ((text, 1.0),)) for i, text in enumerate(texts)]
    return (Corpus("fake", documents, "fake" + "/".join(texts), 0),)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return library.load("bpe", 300, _corpus(_CODE), directory=str(tmp_path_factory.mktemp("bpe")))


def _word_level(path, tokens, **changes):
    """A tokenizer.json made elsewhere, which loses what it does not know."""
    import tokenizers

    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    definition = json.loads(built.to_str()) | changes
    path.write_text(json.dumps(definition))
    return str(path)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=80))
@example(text="")
@example(text="<|endoftext|>")
@example(text=" \n\n\t\t  \r\n   x  \n")
@example(text="e\u0301 🎉🎉 \u200d 👩‍👩‍👧 \x00 \ufffd")
@example(text=_CODE)
def test_text_survives_and_its_bytes_are_counted_once(bpe, name, text):
    tokenizer = bpe if name == "bpe" else library.Bytes()
    ids, num_bytes = tokenizer.encode(text)
    assert ids.dtype == num_bytes.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert num_bytes.sum() == len(text.encode())
    assert len(ids) == len(num_bytes)
    assert tokenizer.end_of_text not in ids
    assert (num_bytes >= 0).all()
    assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60))
@example(text="🎉 naïve\n")
def test_bytes_from_offsets_equal_those_from_the_vocabulary(bpe, text):
    slow = pickle.loads(pickle.dumps(bpe))
    slow._widths = None
    ids, num_bytes = slow.encode(text)
    np.testing.assert_array_equal(ids, bpe.encode(text)[0])
    assert num_bytes.sum() == len(text.encode())
    if text.isascii():
        np.testing.assert_array_equal(num_bytes, bpe.encode(text)[1])


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_decoding_drops_boundaries_and_replaces_bad_utf8(bpe, name):
    tokenizer = bpe if name == "bpe" else library.Bytes()
    ids = np.concatenate([tokenizer.encode("ab")[0], [tokenizer.end_of_text] * 2])
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(tokenizer.encode("a𝄞")[0][:-1]).startswith("a\ufffd")


def test_bpe_merges_words_and_indentation(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(_CODE)[0]) < 0.5 * len(_CODE.encode())
    assert len(bpe.encode("\n    ")[0]) < 5


def test_bpe_is_the_same_when_trained_again_and_is_cached(tmp_path, bpe, monkeypatch):
    corpora = _corpus(_CODE)
    again = library.load("bpe", 300, corpora, directory=str(tmp_path))
    assert again.fingerprint == bpe.fingerprint
    other = library.load("bpe", 301, corpora, directory=str(tmp_path))
    assert other.fingerprint != bpe.fingerprint
    monkeypatch.setattr(library, "_train", None)  # Whoever trains now fails.
    cached = library.load("bpe", 300, corpora, directory=str(tmp_path))
    assert cached.fingerprint == bpe.fingerprint
    with pytest.raises(TypeError):
        library.load("bpe", 300, _corpus(_CODE + "x"), directory=str(tmp_path))
    assert not list(tmp_path.rglob("*.tmp"))


def test_bpe_of_a_large_corpus_reads_only_a_sample(tmp_path, monkeypatch):
    corpora = _corpus(*(_CODE + str(i) for i in range(50)))
    monkeypatch.setattr(library, "_TRAINING_BYTES", 3 * len(_CODE))
    assert 3 <= len(list(library._sample(corpora))) <= 4


def test_every_document_of_every_corpus_is_sampled():
    first, second = _corpus("a", "b")[0], _corpus("c")[0]
    assert sorted(library._sample((first, second))) == ["a", "b", "c"]


def test_tokenizers_are_pickled_for_worker_processes(bpe):
    for tokenizer in (bpe, library.Bytes()):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(copy.encode(_CODE)[0], tokenizer.encode(_CODE)[0])


def test_a_file_is_used_with_its_own_boundary(tmp_path, bpe):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.definition)
    loaded = library.load(str(path), 0, (), directory="")
    assert (loaded.vocab_size, loaded.end_of_text) == (300, bpe.end_of_text)

    path = _word_level(tmp_path / "words.json", {"[UNK]": 0, "le": 1, "café": 2, "</s>": 5})
    loaded = library.load(path, 6, (), directory="", end_of_text="</s>")
    assert (loaded.vocab_size, loaded.end_of_text) == (6, 5)
    ids, num_bytes = loaded.encode("le  café ☃ ")
    assert ids.tolist() == [1, 2, 0]
    assert num_bytes.tolist() == [2, 7, 5]  # White space goes to the token after it, or the last.


def test_a_files_truncation_and_padding_are_off(tmp_path):
    vocabulary = {"[UNK]": 0, "a": 1, "</s>": 2}
    path = _word_level(
        tmp_path / "t.json",
        vocabulary,
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    )
    ids, num_bytes = library.load(path, 0, (), directory="", end_of_text="</s>").encode("a a a a")
    assert len(ids) == 4
    assert num_bytes.sum() == 7


@pytest.mark.parametrize(
    ("name", "vocab_size", "message"),
    [
        ("byte", 0, r"data\.tokenizer 'byte'.*did you mean 'bytes'"),
        ("nowhere/tokenizer.json", 0, r"data\.tokenizer .*no such file; valid are bytes, bpe"),
        ("bytes", 300, r"data\.vocab_size 300.*257"),
        ("bpe", 256, r"data\.vocab_size 256.*at least 257"),
        ("bpe", 100_000, r"data\.vocab_size 100000.*only enough text for"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, name, vocab_size, message):
    with pytest.raises(InputError, match=message):
        library.load(name, vocab_size, _corpus(_CODE), directory=str(tmp_path))


def test_files_that_are_no_tokenizers_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        library.load(str(path), 0, (), directory="")
    path = _word_level(path, {"[UNK]": 0, "a": 1})
    with pytest.raises(
        InputError, match=r"declares no end of text; name it with data\.end_of_text"
    ):
        library.load(path, 0, (), directory="")


def _special(path, tokens, ordinary=("</s>",)):
    """A tokenizer.json whose vocabulary has ordinary entries beside special tokens."""
    import tokenizers

    names = ["[UNK]", "a", *ordinary]
    built = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.add_special_tokens(list(tokens))
    built.save(str(path))
    return str(path)


def test_the_end_of_text_is_the_declared_one_and_not_an_ordinary_entry(tmp_path):
    path = _special(tmp_path / "tokenizer.json", ["<eos>", "<pad>"])
    loaded = library.load(path, 0, (), directory="")
    assert (loaded.end_of_text_token, loaded.end_of_text) == ("<eos>", 3)
    assert loaded.beginning_of_text == loaded.end_of_text
    # Negative control: named outright, the ordinary entry is taken.
    assert library.load(path, 0, (), directory="", end_of_text="</s>").end_of_text == 2


def test_a_tokenizer_config_beside_the_file_decides(tmp_path):
    path = _special(tmp_path / "tokenizer.json", ["<|endoftext|>", "<|im_end|>", "<s>"])
    assert library.load(path, 0, (), directory="").end_of_text_token == "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "<|im_end|>"}, "bos_token": null}'
    )
    loaded = library.load(path, 0, (), directory="")
    assert (loaded.end_of_text_token, loaded.beginning_of_text_token) == ("<|im_end|>", "<s>")
    ids = [loaded.beginning_of_text, 1, loaded.end_of_text]
    assert loaded.decode(np.array(ids)) == "a"


def test_two_ends_are_ambiguous_and_an_unknown_one_is_refused(tmp_path):
    path = _special(tmp_path / "tokenizer.json", ["<eos>", "</s>"], ordinary=())
    with pytest.raises(InputError, match=r"ambiguous: </s>, <eos>; name it with data\.end_of_text"):
        library.load(path, 0, (), directory="")
    assert library.load(path, 0, (), directory="", end_of_text="</s>").end_of_text_token == "</s>"
    with pytest.raises(
        InputError, match=r"data\.end_of_text='<eo>' is not in the vocabulary.*<eos>"
    ):
        library.load(path, 0, (), directory="", end_of_text="<eo>")
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: "):
        library.load(path, 0, (), directory="", end_of_text="</s>")


def test_nothing_slow_is_imported():
    code = (
        "import sys, lm.data.corpora, lm.data.tokenizers, lm.data.batches, lm.data.ngram;"
        "print([m for m in ('tensorflow', 'torch', 'tensorflow_datasets', 'tokenizers')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
