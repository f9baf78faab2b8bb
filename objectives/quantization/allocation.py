"""Which of several widths each item gets: a small integer programme, solved exactly.

n  items, such as the matrices of the layers
p  choices of an item, such as its widths

Plain NumPy in float64, and scipy's HiGHS.
"""

import numpy as np

# HiGHS's tolerance of a constraint and of the gap to the least cost, both absolute.
_TOLERANCE = 1e-6
# So large is the largest difference of costs that it is given.
_LARGEST = 1e6
_MOST_REFUSED = 30


def allocate(costs: np.ndarray, sizes: np.ndarray, budget: float) -> np.ndarray:
    """The choices of least cost that fit a budget of bytes.

      minimise sum_i costs[i, c_i]   over choices c   with   sum_i sizes[i, c_i] <= budget

    With x_{i,p} in {0, 1} and sum_p x_{i,p} = 1 it is the integer programme of SNIP (arXiv
    2602.01410, from a summary: standard form), with bytes in place of FLOPs. Sizes are divided by
    their greatest common divisor where they are integers. The budget is kept to exactly. The cost
    is the least up to 1e-12 of the largest difference between costs of one item; where very many
    choices lie within a millionth above the budget, it is the least a millionth below it.

    Args:
      costs: [n, p], any finite numbers.
      sizes: [n, p], 0 or above.
      budget: in the unit of `sizes`.

    Returns:
      The chosen p of each item, int [n]. Of choices of equal cost any may be returned.

    Raises:
      ValueError: shapes that do not match, a number that is not finite or a negative size, or a
        budget below the least that is possible, which the message names.
    """
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes, np.float64)
    _check(costs, sizes)
    least = sizes.min(axis=1).sum()
    if not budget >= least:
        raise ValueError(f"a budget of {budget:,.15g} is too small: the least is {least:,.15g}")
    if sizes.max(axis=1).sum() <= budget:
        return costs.argmin(axis=1)
    unit = _unit(sizes)
    rows, refused = np.arange(len(sizes)), []
    limit, slack = budget / unit, _TOLERANCE * max(1.0, budget / unit)
    while len(refused) < _MOST_REFUSED:
        # HiGHS keeps to a limit up to its tolerance; what is over the budget by as little is
        # refused by name.
        choice = _solve(costs, sizes / unit, limit + slack, refused)
        if sizes[rows, choice].sum() <= budget:
            return choice
        refused.append(choice)
    choice = _solve(costs, sizes / unit, limit - slack, [])
    return choice if choice is not None else sizes.argmin(axis=1)


def allocate_flops(
    costs: np.ndarray, flops: np.ndarray, narrow: np.ndarray, target: float
) -> np.ndarray:
    """The choices of least cost with at least a share of the FLOPs in narrow formats.

      minimise sum_i costs[i, c_i]   with   sum_i narrow[c_i] flops[i] >= target sum_i flops[i]

    The efficiency of SNIP (arXiv 2602.01410, from a summary): the share of the linear layers' FLOPs
    in FP4, narrow being 1 for FP4 and 0 for FP8. It is `allocate` with sizes
    (1 - narrow[p]) flops[i] and a budget of (1 - target) sum_i flops[i].

    Args:
      costs: [n, p].
      flops: [n], 0 or above.
      narrow: [p], how narrow each choice counts, from 0 to 1.
      target: from 0 to 1.

    Raises:
      ValueError: as `allocate`; a target out of [0, 1], or above what the choices can give.
    """
    flops, narrow = np.asarray(flops, np.float64), np.asarray(narrow, np.float64)
    if not 0 <= target <= 1:
        raise ValueError(f"target must be a share from 0 to 1; got {target}")
    if narrow.ndim != 1 or not ((narrow >= 0) & (narrow <= 1)).all():
        raise ValueError(f"narrow must be shares [p] from 0 to 1; got {narrow}")
    if target > narrow.max():
        raise ValueError(f"a target of {target} is above the most that is possible, {narrow.max()}")
    total = flops.sum()
    # Sums of floats may miss the limit by their last bits.
    budget = (1 - target) * total + 1e-12 * total
    return allocate(costs, flops[:, None] * (1 - narrow), budget)


def _check(costs: np.ndarray, sizes: np.ndarray) -> None:
    if costs.ndim != 2 or not costs.size or costs.shape != sizes.shape:
        raise ValueError(
            f"costs and sizes must be [items, widths] of one shape; got {costs.shape} and "
            f"{sizes.shape}"
        )
    if not np.isfinite(costs).all() or not np.isfinite(sizes).all() or (sizes < 0).any():
        raise ValueError("costs must be finite, sizes finite and at least 0")


def _unit(sizes: np.ndarray) -> float:
    """The greatest common divisor of integers, else the mean."""
    if (sizes == np.rint(sizes)).all() and sizes.max() < 2**53:
        return float(np.gcd.reduce(sizes.astype(np.int64).reshape(-1)))
    return float(sizes.mean())


def _solve(
    costs: np.ndarray, sizes: np.ndarray, limit: float, refused: list[np.ndarray]
) -> np.ndarray | None:
    """The best choice within the limit, up to the tolerance, but those refused; None for none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron, vstack

    items, choices = costs.shape
    # An item's costs count from its own least one, so that rounding is relative to differences.
    costs = costs - costs.min(axis=1, keepdims=True)
    one_each = kron(eye_array(items), np.ones((1, choices)))
    others = [np.eye(choices)[choice].reshape(1, -1) for choice in refused]
    rows = csr_array(vstack([one_each, csr_array(sizes.reshape(1, -1)), *map(csr_array, others)]))
    lower = np.r_[np.ones(items), np.full(1 + len(refused), -np.inf)]
    upper = np.r_[np.ones(items), limit, np.full(len(refused), items - 1.0)]
    found = milp(
        costs.reshape(-1) * (_LARGEST / (costs.max() or 1.0)),
        integrality=np.ones(items * choices),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, lower, upper),
        options={"mip_rel_gap": 0},
    )
    return None if found.x is None else found.x.reshape(items, choices).argmax(axis=1)
