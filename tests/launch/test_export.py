"""Formats that declare one width are refused to models of several."""

import pytest

from launch.export import one_width
from lm.errors import InputError
from objectives.quantization import absmax, mixed


def test_one_width_is_that_of_all_layers_of_all_matrices():
    assert one_width([absmax(4), absmax(4), mixed([absmax(4), absmax(4)])]) == 4
    for quantizers in ([absmax(4), absmax(8)], [absmax(4), mixed([absmax(4), absmax(8)])]):
        with pytest.raises(InputError, match=r"one width, .* have 4, 8 bits; valid: --format=gguf"):
            one_width(quantizers)
