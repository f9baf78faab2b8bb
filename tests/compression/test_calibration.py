"""Rows that are taken from calibration batches."""

import jax
import numpy as np
import pytest
import tiny

from lm.compression.calibration import sample_rows

BATCHES = [tiny.batch(4, 8, seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(1, [0]), (16, [0, 6]), (17, [0, 4, 8]), (96, range(12)), (1000, range(12))],
)
def test_rows_are_taken_evenly(tokens, rows):
    got = sample_rows(BATCHES, tokens)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *BATCHES)
    assert got.keys() == whole.keys()
    for name, array in got.items():
        np.testing.assert_array_equal(array, whole[name][list(rows)])


def test_every_device_has_a_row():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    got = sample_rows([jax.device_put(batch, rows) for batch in BATCHES], 1)
    assert got["tokens"].shape == (4, 8)
    assert got["tokens"].sharding == rows
