"""What the benchmark counts and how it sums up, against other counts and toy timings."""

import time

import jax
import numpy as np
import pytest
import tiny

from configs.benchmark import get_config
from lm.planning import benchmark, timing
from lm.training import experiment

# Issue: model FLOPs of a token, by hand: 6 x (layers + head) + 12 L T D.
BY_HAND = {
    "tiny": 6 * (4 * 12 * 128**2 + 256 * 128) + 12 * 4 * 256 * 128,
    "small": 6 * (6 * 12 * 384**2 + 256 * 384) + 12 * 6 * 256 * 384,
    "tiny_50k": 6 * (4 * 12 * 128**2 + 50_304 * 128) + 12 * 4 * 256 * 128,
    "small_50k": 6 * (6 * 12 * 384**2 + 50_304 * 384) + 12 * 6 * 256 * 384,
}
PUBLISHED = {"tiny": "6.49", "small": "71.4", "tiny_50k": "44.9", "small_50k": "187"}


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_of_a_token_are_those_of_the_published_comparison(name):
    c = get_config(name)
    run = experiment.build(c, c.data.vocab_size, 1)
    assert run.flops_per_token() == BY_HAND[name]
    digits = len(PUBLISHED[name].replace(".", ""))
    assert f"{run.flops_per_token() / 1e6:.{digits}g}" == PUBLISHED[name]


def pieces(names, **overrides):
    run = experiment.build(tiny.config(**overrides), tiny.VOCAB, jax.devices()[:1])
    return run, benchmark.collect({"toy": run}, names)


@pytest.mark.slow
def test_a_step_trains_and_each_item_says_what_it_counts():
    run, (step, *rest) = pieces(["cross_entropy", "attention", "optimizer"])
    losses = [float(step.run()["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0]
    b, t, d, v = 8, 32, 32, tiny.VOCAB
    assert step.flops == run.flops_per_token() * b * t
    entropy, attention, optimizer = rest
    assert (entropy.flops, entropy.bytes) == (6 * b * t * d * v, 8 * (b * t * d + d * v))
    # Four arrays of eight are half as wide: two key and value heads for four of queries.
    assert attention.flops == 12 * b * t * t * d
    assert attention.bytes == 2 * 4 * b * t * (d + d // 2 + d // 2 + d)
    count = sum(x.size for x in jax.tree.leaves(run.abstract_state().trained))
    # Parameters and two moments are read and written, gradients read; then a few counters.
    assert 0 < optimizer.bytes - 4 * 7 * count < 200


@pytest.mark.slow
def test_a_variant_is_the_step_with_its_change():
    _, items = pieces(["variants"], objective__rho1__keep=0.5)
    found = {item.name.removeprefix("variant "): item for item in items[1:]}
    assert found.keys() == benchmark.VARIANTS.keys()
    names = ("plain", "4 bits", "rho1, stored losses")
    first = {name: found[name].run() for name in names}
    # The same batch and parameters: weights on their grid, or half of the tokens, make the change.
    assert float(first["4 bits"]["loss"]) != pytest.approx(float(first["plain"]["loss"]), rel=1e-6)
    counts = [float(first[name]["weight_sum"]) for name in names]
    assert counts[0] == counts[1] == pytest.approx(2 * counts[2], rel=0.02)


def test_dense_cross_entropy_has_the_gradients_of_the_blocked_one():
    _, (_, blocked, dense) = pieces(["cross_entropy"], objective__block_size=32)
    assert dense.name == f"dense {blocked.name}"
    for a, b in zip(blocked.run(), dense.run(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_sampling_of_many_sequences_is_that_of_each():
    """The first prompt is the same, and what is drawn after it is of the model."""
    _, items = pieces(["sampling"])
    one, many = items[1:]
    assert (one.name, one.tokens) == ("sampling 1 x 128", 128)
    assert (many.name, many.tokens) == ("sampling 64 x 128", 64 * 128)
    assert one.bytes == many.bytes
    for item in (one, many):
        drawn = item.run()
        assert drawn.tokens_BS.shape == (item.tokens // 128, 128)
        assert (np.asarray(drawn.measured.log_probability_B) < 0).all()


@pytest.mark.slow
def test_every_quantizer_and_weighting_is_timed():
    _, items = pieces(["quantizers", "weightings"])
    seconds = timing.measure(items[1:], repeats=1)
    names = {name.split()[1] for name in seconds}
    assert names == {*benchmark.QUANTIZERS, *benchmark.WEIGHTINGS} - {"paretoq"}
    assert all(times[0] > 0 for times in seconds.values())


def test_items_take_turns_after_a_warm_up():
    order = []

    def item(name, reads_ahead=False):
        def run():
            order.append(name)
            time.sleep(0.03)
            return np.zeros(())

        return benchmark.Item(name, run, 0, 0, "", reads_ahead=reads_ahead)

    seconds = timing.measure([item("r", True), item("a"), item("b")], repeats=2)
    # What reads ahead works in the time of others, and comes when they are done.
    # Each timing has a run before it that is not timed.
    assert order == [*"aabb", *"aabbaabb", *"rr", *"rrrr"]
    assert all(len(times) == 2 and min(times) >= 0.03 for times in seconds.values())


def test_a_figure_is_the_longer_limit_over_the_median():
    limits = timing.limits(
        [
            benchmark.Item("small product", None, 100, 0, ""),
            benchmark.Item("large product", None, 800, 0, ""),
            benchmark.Item("half", None, 900, 0, "", "bfloat16"),
            benchmark.Item("memory", None, 0, 60, ""),
        ],
        {
            "small product": [2.0, 1.0],
            "large product": [5.0, 4.0],
            "half": [1.0],
            "memory": [3.0, 2.0],
        },
    )
    assert limits == ({"float32": 200.0, "bfloat16": 900.0}, 30.0)
    item = benchmark.Item("x", None, 400, 30, "", tokens=8)
    f = timing.figure(item, [3.0, 4.0, 4.0, 5.0, 10.0], limits)
    assert (f.lower, f.seconds, f.upper, f.repeats) == (4.0, 4.0, 5.0, 5)
    assert (f.limit, f.bound, f.fraction, f.tokens_per_second) == (2.0, "products", 0.5, 2.0)
    slow = timing.figure(item._replace(bytes=90), [4.0], limits)
    assert (slow.limit, slow.bound, slow.fraction) == (3.0, "memory", 0.75)
