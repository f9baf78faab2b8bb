"""benchmarks/held_out.py: which tokens it scores, and what it refuses."""

import numpy as np
import pytest

from benchmarks import held_out
from lm.data.tokenizers import Bytes
from lm.errors import InputError


def test_the_last_tokens_of_a_text_are_scored_once_each():
    text = "".join(chr(97 + i % 26) for i in range(20_000))
    ids = held_out.tokens(Bytes(), text)
    assert bytes(ids[-1].tolist()).decode() == text[-512:]
    batches = list(held_out.rows(ids))
    assert sum(int(batch["weights"].sum()) for batch in batches) == 32 * 511
    for batch in batches:
        np.testing.assert_array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:])
        np.testing.assert_array_equal(batch["positions"][0], np.arange(511))


def test_texts_that_cannot_be_scored_are_refused(tmp_path):
    with pytest.raises(InputError, match="16,384 or more"):
        held_out.tokens(Bytes(), "short")
    with pytest.raises(InputError, match="no such file"):
        held_out.read(str(tmp_path / "missing.txt"))
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 10)
    with pytest.raises(InputError, match="not UTF-8"):
        held_out.read(str(path))
