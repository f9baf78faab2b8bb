import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.ngram import _probabilities, _symbols, witten_bell_bits_per_byte
from lm.errors import InputError

_texts = st.lists(st.binary(max_size=12).map(lambda b: bytes(x % 3 + 97 for x in b)), max_size=5)


def _reference(train, validation, order):
    """The formula, one symbol at a time."""
    counts = defaultdict(Counter)
    for text in train:
        symbols = [256] * (order - 1) + list(text) + [256]
        for i in range(order - 1, len(symbols)):
            for n in range(order):
                counts[tuple(symbols[i - n : i])][symbols[i]] += 1

    def probability(history, symbol):
        shorter = probability(history[1:], symbol) if history else 1 / 257
        seen = counts.get(history)
        if not seen:
            return shorter
        return (seen[symbol] + len(seen) * shorter) / (sum(seen.values()) + len(seen))

    bits = 0.0
    for text in validation:
        symbols = [256] * (order - 1) + list(text) + [256]
        for i in range(order - 1, len(symbols)):
            bits -= math.log2(probability(tuple(symbols[i - order + 1 : i]), symbols[i]))
    return bits / sum(map(len, validation))


@settings(deadline=None, max_examples=60)
@given(train=_texts, validation=_texts, order=st.integers(1, 7))
def test_equals_a_plain_reference(train, validation, order):
    validation = [*validation, b"abc"]  # There must be something to predict.
    ours = witten_bell_bits_per_byte(train, validation, order)
    assert ours == pytest.approx(_reference(train, validation, order), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4, 7])
def test_probabilities_of_all_continuations_sum_to_one(order):
    train, _ = _symbols([b"abracadabra", b"", b"banana"], order)
    history = b"abra"[-(order - 1) :] if order > 1 else b""
    texts = [history + bytes([symbol]) for symbol in range(256)]
    ours = []
    for text in [*texts, history]:
        validation, _ = _symbols([text], order)
        # The last byte, or for the last text the boundary that closes it.
        ours.append(_probabilities(train, validation, order)[-2 if text in texts else -1])
    assert np.sum(ours) == pytest.approx(1.0, rel=1e-12)


def test_without_training_text_all_symbols_are_as_likely():
    assert witten_bell_bits_per_byte([], [b"ab"], 3) == pytest.approx(1.5 * math.log2(257))


def test_longer_histories_help_on_regular_text():
    text = b"the cat sat on the mat and the dog sat on the log; " * 20
    bits = [witten_bell_bits_per_byte([text], [text], order) for order in (1, 2, 4)]
    assert bits[0] > bits[1] > bits[2]


@pytest.mark.parametrize("order", [0, 8])
def test_refuses_other_orders(order):
    with pytest.raises(InputError, match=r"evaluation\.ngram_order"):
        witten_bell_bits_per_byte([b"a"], [b"a"], order)


def test_refuses_to_divide_by_no_text():
    with pytest.raises(InputError, match="no text"):
        witten_bell_bits_per_byte([b"a"], [b""], 2)
