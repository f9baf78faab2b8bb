"""The integer programme against all choices there are."""

import itertools

import numpy as np
import pytest

from objectives.quantization.allocation import allocate, allocate_flops


def brute_force(costs, sizes, budget):
    """The least cost of all choices that fit."""
    items, choices = costs.shape
    rows, best = np.arange(items), np.inf
    for choice in itertools.product(range(choices), repeat=items):
        if sizes[rows, list(choice)].sum() <= budget:
            best = min(best, costs[rows, list(choice)].sum())
    return best


def problem(seed, items=8, whole=True):
    """Costs that fall with the width over five orders of magnitude, sizes of matrices."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-4, 1, (items, 1))
    costs = scale * np.sort(rng.random((items, 3)))[:, ::-1]
    parameters = rng.integers(1, 9, (items, 1)) * (1024 if whole else np.pi)
    return costs, parameters * np.array([2, 4, 8]) / 8


def total(table, choice):
    return table[np.arange(len(table)), choice].sum()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_choices(seed, whole):
    costs, sizes = problem(seed, 3 + seed, whole)
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    for share in (0.0, 0.1, 0.33, 0.5, 0.77, 0.999):
        budget = least + share * (most - least)
        choice = allocate(costs, sizes, budget)
        assert total(sizes, choice) <= budget
        np.testing.assert_allclose(
            total(costs, choice), brute_force(costs, sizes, budget), rtol=1e-9
        )
    # Negative control: cost counts, not only size.
    assert not (allocate(costs[::-1], sizes, budget) == choice).all() or seed == 0


def test_costs_that_grow_with_the_width_or_are_negative_are_costs_too():
    rng = np.random.default_rng(5)
    costs, sizes = rng.normal(size=(7, 3)), problem(5, 7)[1]
    budget = sizes.min(1).sum() * 1.7
    found = total(costs, allocate(costs, sizes, budget))
    np.testing.assert_allclose(found, brute_force(costs, sizes, budget), rtol=1e-9)
    assert (allocate(-np.ones((3, 2)), np.ones((3, 2)), 3) == 0).all()


def test_the_limits_and_in_between_more_bytes_never_cost_more():
    costs, sizes = problem(1, 40)
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    assert (allocate(costs, sizes, most) == 2).all()
    assert (allocate(costs, sizes, least) == 0).all()
    with pytest.raises(ValueError, match=f"the least is {least:,.15g}"):
        allocate(costs, sizes, least - 1)
    budgets = np.linspace(least, most, 30)
    found = [total(costs, allocate(costs, sizes, b)) for b in budgets]
    assert (np.diff(found) <= 1e-9).all()
    assert found[0] > found[15] > found[-1]


def test_sizes_of_billions_of_bytes_keep_to_the_byte():
    costs, sizes = problem(2, 6)
    sizes = sizes * 2**20 + np.arange(6)[:, None] * 8 + 1
    choice = allocate(costs, sizes, sizes.mean(1).sum())
    budget = total(sizes, choice)
    assert total(sizes, allocate(costs, sizes, budget)) == budget
    less = allocate(costs, sizes, budget - 1)
    assert total(sizes, less) < budget
    np.testing.assert_allclose(total(costs, less), brute_force(costs, sizes, budget - 1), rtol=1e-9)


def test_a_target_of_flops():
    """SNIP's limits: target 0 takes the wide format everywhere, target 1 the narrow one."""
    rng = np.random.default_rng(0)
    costs = np.stack([rng.random(8), np.zeros(8)], axis=1)  # FP4 costs, FP8 does not
    flops = rng.random(8)
    narrow = np.array([1.0, 0.0])
    assert (allocate_flops(costs, flops, narrow, 0) == 1).all()
    assert (allocate_flops(costs, flops, narrow, 1) == 0).all()
    found = []
    for target in np.linspace(0, 1, 11):
        choice = allocate_flops(costs, flops, narrow, target)
        assert (narrow[choice] * flops).sum() >= target * flops.sum() - 1e-9
        best = min(
            total(costs, list(c))
            for c in itertools.product(range(2), repeat=8)
            if (narrow[list(c)] * flops).sum() >= target * flops.sum() - 1e-9
        )
        np.testing.assert_allclose(total(costs, choice), best, atol=1e-12)
        found.append(total(costs, choice))
    assert (np.diff(found) >= -1e-12).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 2)), np.ones((2, 3)), 9), "of one shape"),
        ((np.ones((0, 2)), np.ones((0, 2)), 9), "of one shape"),
        ((np.array([[np.nan, 1]]), np.ones((1, 2)), 9), "must be finite"),
        ((np.ones((1, 2)), -np.ones((1, 2)), 9), "at least 0"),
        ((np.ones((1, 2)), np.ones((1, 2)), np.nan), "too small"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)
    for target, narrow in ((1.5, [1, 0]), (0.9, [0.5, 0]), (0.5, [2, 0])):
        with pytest.raises(ValueError, match=r"target|narrow"):
            allocate_flops(np.ones((1, 2)), np.ones(1), np.array(narrow, float), target)
