"""Compiling does not take longer for more layers: the program loops over them."""

import statistics
import time

import jax
import pytest
import tiny

from lm.planning import ahead
from lm.training import experiment


def lowered(layers, **changes):
    """The train step of the quantized phase, with a weighting, an average and Muon."""
    config = tiny.config(
        model__layers=layers,
        data__sequence_length=16,
        train__ema_decay=0.9,
        objective__weighting="dynamic",
        optimizer__name="muon",
        optimizer__schedule="wsd",
        quantization__bits=4.0,
        quantization__fraction="0.5",
        **changes,
    )
    run = experiment.build(config, tiny.VOCAB, jax.devices()[:1])
    with jax.set_mesh(run.mesh):
        return run.train_step(True).lower(run.abstract_state(), ahead.abstract_batch(run))


def instructions(layers, **changes):
    return lowered(layers, **changes).as_text().count(" = ")


@pytest.mark.slow
def test_64_layers_have_no_more_instructions_than_8():
    few = instructions(8, model__unroll=1)
    assert instructions(64, model__unroll=1) <= 1.02 * few
    # As users have them, 8 layers are all in one turn of the loop, and 64 are not.
    assert instructions(64) <= few * 1.02 < instructions(8)
    # Negative control: with layers in one turn, the number is seen to grow.
    assert instructions(16, model__unroll=16) > 1.3 * few


@pytest.mark.slow
def test_64_layers_take_no_longer_to_compile_than_8(compiled_anew):
    """Processor time, which other work on the machine does not add to; median of three each."""

    def seconds(layers):
        start = time.process_time()
        lowered(layers, model__unroll=1).compile()
        return time.process_time() - start

    pairs = [(seconds(8), seconds(64)) for _ in range(3)]
    few, many = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert many <= 1.3 * few
