"""A known share of documents has its words in random order, and nothing else changes."""

import collections

import pytest
import tiny

from lm.data import corruption
from lm.data.documents import Corpus, Document
from lm.errors import InputError
from lm.training import experiment


def corpus(count=2000):
    documents = [
        Document(f"file{i}", (("the prompt here ", 0.0), (f"one two\n  three four {i} ü six", 1.0)))
        for i in range(count)
    ]
    return Corpus("x", documents, "f", 0)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_share_is_kept_and_only_the_order_of_words_changes(share):
    clean = corpus()
    noisy = corruption.corrupt(clean, share)
    changed = 0
    for before, after in zip(clean.documents, noisy.documents, strict=True):
        assert after.name == before.name
        assert after.spans[0] == before.spans[0]
        assert len(after.text.encode()) == len(before.text.encode())
        count = collections.Counter(after.text.split())
        assert count == collections.Counter(before.text.split())
        corrupted = corruption.is_corrupted(before.name, share)
        assert corrupted or after == before
        changed += after != before
    # 1 of 720 orders of six words is the old one.
    assert abs(changed / 2000 - share * 719 / 720) < 0.04
    assert noisy.fingerprint != clean.fingerprint
    assert list(noisy.documents) == list(corruption.corrupt(clean, share).documents)


def test_without_a_share_the_corpus_is_the_same_object():
    clean = corpus(3)
    assert corruption.corrupt(clean, 0.0) is clean


def test_a_share_beyond_one_is_refused():
    with pytest.raises(InputError, match=r"data\.corrupted=1\.5"):
        corruption.corrupt(corpus(3), 1.5)


def test_a_run_gets_it_in_training_only_and_with_the_tokens_of_clean_text(tmp_path):
    c = tiny.config(data__corpus=tiny.write_corpus(tmp_path / "corpus")).data
    c.update(tokenizer="bpe", vocab_size=280, directory=str(tmp_path / "cache"))
    clean = experiment.load_data(c)
    c.corrupted = 0.9
    noisy = experiment.load_data(c)
    assert noisy.tokenizer.fingerprint == clean.tokenizer.fingerprint
    assert noisy.validation[0].fingerprint == clean.validation[0].fingerprint
    assert noisy.train[0].documents[0].name == clean.train[0].documents[0].name
    assert [d.text for d in noisy.train[0].documents] != [d.text for d in clean.train[0].documents]
