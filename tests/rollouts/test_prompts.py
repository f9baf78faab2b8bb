"""Prompts and rows on toys small enough to be written down by hand."""

import jax
import numpy as np
import pytest

from lm.data import tokenizers
from lm.data.documents import Corpus, Document
from lm.data.layout import BATCH
from lm.errors import InputError
from lm.rollouts.prompts import Prompts, check_prompts, read_prompts
from lm.rollouts.sampling import Completions
from lm.rollouts.source import make_rows

# The end of a document's answer and a question, an answer in two parts; plain text in two pieces;
# a question without its answer, then padding; padding alone; two questions.
SEGMENTS = [
    [1, 1, 1, 2, 2, 2, 2, 2],
    [1, 1, 1, 1, 1, 2, 2, 2],
    [1, 1, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 2, 2, 2, 2],
]
WEIGHTS = [
    [0, 1, 1, 0, 0, 2, 0, 1],
    [1, 1, 1, 1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 1, 1, 0, 1, 1, 1],
]
PLACES = [
    [5, 6, 7, 0, 1, 2, 3, 4],
    [9, 10, 11, 12, 13, 0, 1, 2],
    [0, 1, 2, 3, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 1, 2, 3, 0, 1, 2, 3],
]


@pytest.fixture(scope="module")
def batch():
    tokens = 10 * np.arange(5)[:, None] + np.arange(8)
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.array(SEGMENTS, np.int32),
        "weights": np.array(WEIGHTS, np.float32),
        "sample_positions": np.array(PLACES, np.int32),
        "sample_ids": np.where(SEGMENTS, 100 * np.arange(5)[:, None] + SEGMENTS, -1),
    }


def prompts(batch, seed=0, **options):
    return jax.device_get(read_prompts(batch, jax.random.split(jax.random.key(seed), 5), **options))


def texts(found):
    """The prompts without their padding; None where there is none."""
    rows = zip(found.tokens_BP, found.mask_BP, found.found_B, strict=True)
    return [row[mask != 0].tolist() if there else None for row, mask, there in rows]


def test_prompts_reach_up_to_where_an_answer_begins(batch):
    found = prompts(batch, longest=6)
    assert texts(found)[:4] == [[3, 4, 5], None, None, None]
    assert found.sample_ids_B[0] == 2
    assert found.sample_positions_B[0] == 0
    np.testing.assert_array_equal(found.mask_BP[0], [0, 0, 0, 1, 1, 1])
    assert (found.mask_BP.sum(axis=1) >= 1).all()  # The decoder reads a token of every row.


def test_each_document_of_a_row_is_drawn_as_often(batch):
    drawn = [texts(prompts(batch, seed, longest=6))[4] for seed in range(40)]
    assert set(map(tuple, drawn)) == {(40, 41, 42), (44, 45)}
    assert 10 < drawn.count([44, 45]) < 30


def test_long_prompts_keep_their_end(batch):
    found = prompts(batch, longest=2)
    assert texts(found)[0] == [4, 5]
    assert found.sample_positions_B[0] == 1


def test_plain_text_gives_its_beginning_where_there_is_no_question(batch):
    found = prompts(batch, longest=7, plain=4)
    assert texts(found)[:4] == [[3, 4, 5], [10, 11, 12, 13], [20, 21, 22, 23], None]
    assert found.sample_positions_B[1] == 9
    assert texts(prompts(batch, longest=7, plain=7))[1] == [10, 11, 12, 13, 14]  # Its piece ends.


def test_rows_by_hand():
    """A completion that ends, one that is cut at its third token, and no prompt."""
    asked = Prompts(
        np.array([[0, 5, 6], [1, 2, 3], [0, 0, 9]]),
        np.array([[0, 1, 1], [1, 1, 1], [0, 0, 1]]),
        np.array([True, True, False]),
        np.array([7, 8, 9]),
        np.array([0, 4, 2]),
    )
    said = Completions(np.array([[50, 36, 36], [51, 52, 53], [1, 2, 3]]), np.array([2, 3, 3]))
    rows = jax.device_get(make_rows(asked, said, 7))
    expected = {
        "tokens": [[5, 6, 50, 0, 0, 0, 0], [1, 2, 3, 51, 52, 0, 0]],
        "targets": [[6, 50, 36, 0, 0, 0, 0], [2, 3, 51, 52, 53, 0, 0]],
        "weights": [[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]],
        "segment_ids": [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]],
        "positions": [[0, 1, 2, 0, 0, 0, 0], [0, 1, 2, 3, 4, 0, 0]],
        "sample_ids": [[7, 7, 7, -1, -1, -1, -1], [8, 8, 8, 8, 8, -1, -1]],
        "sample_positions": [[0, 1, 2, 0, 0, 0, 0], [4, 5, 6, 7, 8, 0, 0]],
        "num_bytes": [[0] * 7, [0] * 7],
    }
    assert rows.keys() == BATCH.keys()
    for name, dtype in BATCH.items():
        padding = [[-1 if name == "sample_ids" else 0] * 7]
        np.testing.assert_array_equal(rows[name], expected[name] + padding, err_msg=name)
        assert rows[name].dtype == dtype


def test_corpora_without_prompts_are_refused():
    tokenizer = tokenizers.load("bytes", 0, (), directory="")
    plain = Document("a", (("text", 1.0),))
    empty = Document("b", (("", 0.0), ("answer", 1.0)))
    asked = Document("c", (("question", 0.0), ("answer", 1.0)))
    without = [Corpus("x", [plain, empty], "x", 0)]
    with pytest.raises(InputError, match=r"no document has a prompt.*rollouts\.prompt_tokens") as e:
        check_prompts(without, tokenizer, 0)
    assert "\n" not in str(e.value)
    check_prompts(without, tokenizer, 4)
    check_prompts([*without, Corpus("y", [plain, asked], "y", 0)], tokenizer, 0)
