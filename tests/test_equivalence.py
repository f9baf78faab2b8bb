import numpy as np
import pytest
from equivalence import TOLERANCE, cases, compare

BEFORE = {
    "rho1 plain|metric loss|0": np.float32(2.0),
    "rho1 plain|trained|0": np.array([1.0, -4.0], np.float32),
    "rho1 plain|compiles|": np.asarray(1),
    "dft plain|metric loss|0": np.float32(np.nan),
}


def test_identical_traces_are_identical():
    assert compare(BEFORE, dict(BEFORE)) == {"rho1 plain": 0.0, "dft plain": 0.0}


def test_a_difference_is_relative_to_the_largest_entry_and_a_second_compile_is_refused():
    after = BEFORE | {"rho1 plain|trained|0": np.array([1.0, -4.004], np.float32)}
    assert compare(BEFORE, after)["rho1 plain"] == pytest.approx(1e-3, rel=1e-3)
    assert compare(BEFORE, after)["rho1 plain"] > TOLERANCE
    assert compare(BEFORE, BEFORE | {"rho1 plain|compiles|": np.asarray(2)})["rho1 plain"] == np.inf
    assert (
        compare(BEFORE, BEFORE | {"rho1 plain|metric loss|0": np.float32(np.nan)})["rho1 plain"]
        == np.inf
    )


def test_a_missing_metric_and_another_dtype_are_refused():
    with pytest.raises(ValueError, match="missing after: dft plain"):
        compare(BEFORE, {k: v for k, v in BEFORE.items() if not k.startswith("dft")})
    with pytest.raises(ValueError, match="float32"):
        compare(BEFORE, BEFORE | {"rho1 plain|metric loss|0": np.float64(2.0)})


def test_every_weighting_and_loss_is_a_case_in_four_ways():
    from objectives.losses import LOSSES
    from objectives.weighting import WEIGHTINGS

    for name in {*WEIGHTINGS, *LOSSES} - {"cross_entropy"}:
        for mode in ("plain", "accumulated", "quantized", "mesh"):
            assert f"{name} {mode}" in cases()
