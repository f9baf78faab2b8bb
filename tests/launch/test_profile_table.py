"""The table of launch.plan --profile, from a measured step."""

import pytest

from launch.profile_table import digits, lines
from lm.planning import profile
from lm.planning.instructions import Instruction
from lm.planning.profile import Limits, Measured, Work

LIMITS = Limits(100e9, 10e9, "here")
PRODUCT = Instruction("fusion", "jit(train_step)/layers/mlp/dot_general", int(2e9), 10**7)
NORM = Instruction("fusion", "jit(train_step)/norm/mul", 0, 2 * 10**8)


def measured(work):
    names = profile.kinds(program=True)
    seconds = {k: sum(w.seconds for w in work if w.kind == k) for k in names}
    return Measured(1, 1, 0.2, seconds, {0: 0.05, 1: 0.12, 2: 0.03}, "step.hlo.txt", work)


def table(work, limits=LIMITS):
    one = measured(work)
    return lines(one, limits, profile.compare(one, {"matrix products": 0.03}, limits), 1)


def test_a_reader_sees_what_limits_the_step():
    work = [Work("matrix products", 2, 0.1, PRODUCT), Work("norms", 1, 0.05, NORM)]
    head, columns, step, products, norms, none, summary, beside = table(work)
    assert head == "1 step on 1 device; peak and bandwidth: here"
    assert columns.split("  ")[-1] == "of bandwidth"
    # Two products of 20 ms and a pass of 20 ms.
    assert step.split() == ["step", "200", "60.0", "20.0", "20.0%", "1.10", "11.0%"]
    numbers = ["100", "50.0%", "30.0", "40.0", "40.0", "40.0%", "0.200", "2.0%"]
    assert products.split() == ["matrix", "products", *numbers]
    assert norms.split() == ["norms", "50.0", "25.0%", "20.0", "4.00", "40.0%"]
    assert none.split() == ["no", "operation", "50.0", "25.0%"]
    assert summary == (
        "products: 50.0% of the step at 40% of the peak; "
        "the rest: 25.0% of the step at 40% of the bandwidth; no operation: 25.0%"
    )
    assert beside == "one operation at a time: 60.0% of the step; several side by side: 15.0%"


def test_what_the_program_does_not_have_is_said():
    work = [Work("matrix products", 2, 0.1, PRODUCT), Work(profile.OTHER, 1, 0.05, None)]
    assert table(work)[-1] == "25.0% of the step is not in step.hlo.txt"
    assert "not in" not in table([*work[:1], work[1]._replace(seconds=1e-4)])[-1]


def test_without_limits_there_are_no_shares_of_them():
    found = table([Work("matrix products", 2, 0.1, PRODUCT)], Limits(None, None, "unknown"))
    assert found[3].split() == ["matrix", "products", "100", "50.0%", "30.0", "40.0", "0.200"]
    assert found[-1] == "no peak is known to estimate by: set --config.train.peak_flops"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (8886.3, "8,890"),
        (1234567.0, "1,230,000"),
        (201.4, "201"),
        (99.96, "100"),
        (17.08, "17.1"),
        (2.0, "2.00"),
        (0.4259, "0.426"),
        (0.00001234, "0.0000123"),
        (0, "0"),
        (None, ""),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(number, expected):
    assert digits(number) == expected
