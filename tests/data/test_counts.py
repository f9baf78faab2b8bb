"""Documents without a target are counted and said once, at the start."""

import pytest

from lm.data import corpora
from lm.data.counts import describe_without_target
from lm.data.documents import Corpus


def load(path):
    return corpora.load(str(path), "train", directory=str(path), validation_fraction=1e-9)


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (['{"text": ""}', '{"text": "a"}', '{"text": " "}', '{"text": ""}'], 2),
        (['{"prompt": "a", "response": ""}', '{"prompt": "", "response": "b"}'], 1),
        (['{"text": "a"}'], 0),
    ],
)
def test_of_a_file_of_records(tmp_path, lines, count):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    found = load(path)
    assert found[0].without_target == count
    said = f"documents without a target: {count} of {len(lines)} in {path}"
    assert describe_without_target(found) == (said if count else "")


def test_of_a_folder(tmp_path):
    for name, text in (("a.txt", "a"), ("b.txt", ""), ("c.txt", "c")):
        (tmp_path / name).write_text(text)
    assert load(tmp_path)[0].without_target == 1


def test_the_default_corpus_says_what_it_has(tmp_path):
    (corpus,) = corpora.load("stdlib", "train", directory=str(tmp_path), validation_fraction=0.05)
    empty = sum(not document.text for document in corpus.documents)
    assert corpus.without_target == empty > 0


def test_the_line_names_every_corpus_that_has_some():
    texts = [
        Corpus("a", ("",) * 1234, "", 0, 1000),
        Corpus("b", ("",), "", 0),
        Corpus("c", ("",), "", 0, 1),
    ]
    line = "documents without a target: 1,000 of 1,234 in a, 1 of 1 in c"
    assert describe_without_target(texts) == line
