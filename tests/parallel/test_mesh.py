"""Meshes of several slices, from stand-ins for their devices."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lm.errors import InputError
from lm.parallel.mesh import AXES, arrange, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX asks of a device to lay a mesh on it."""

    id: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def tpus(slices, sizes=(4, 4, 1)):
    """Slices of that many chips along each axis, in no particular order."""
    chips = [coords[::-1] for coords in itertools.product(*map(range, sizes[::-1]))]
    devices = [
        Device(s * len(chips) + i, s, coords)
        for s in range(slices)
        for i, coords in enumerate(chips)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


def slice_of(mesh):
    return np.vectorize(lambda device: device.slice_index, otypes=[int])(mesh)


@pytest.mark.parametrize("shape", [(2, 16, 1, 1), (8, 4, 1, 1), (4, 2, 4, 1), (2, 2, 4, 2)])
def test_only_the_data_axis_spans_slices(shape):
    found = slice_of(arrange(shape, tpus(2)))
    assert found.shape == shape
    # All of one half of the data axis lies in one slice, whatever the other indices are.
    assert (found[: shape[0] // 2] == 0).all()
    assert (found[shape[0] // 2 :] == 1).all()


def test_every_device_has_one_place():
    devices = tpus(4, (2, 2, 1))
    found = arrange((8, 2, 1, 1), devices)
    assert {device.id for device in found.flat} == {device.id for device in devices}


@pytest.mark.parametrize(
    ("devices", "shape"),
    [(tpus(2), (1, 32, 1, 1)), (tpus(4), (2, 32, 1, 1)), (tpus(2)[1:], (2, 16, 1, 1))],
)
def test_a_data_axis_that_slices_do_not_share_is_refused(devices, shape):
    with pytest.raises(InputError, match=r"mesh.data=\d is not divisible by the \d slices"):
        arrange(shape, devices)


def test_other_axes_may_span_hosts_of_gpus():
    """JAX gives them slices of their own, and one network may join all of them."""
    gpus = [Device(i, i // 8, platform="gpu", device_kind="NVIDIA H100") for i in range(16)]
    found = arrange((1, 16, 1, 1), gpus[::-1])
    assert [device.id for device in found.flat] == list(range(16))
    assert (slice_of(arrange((2, 8, 1, 1), gpus)) == [[[[0]]] * 8, [[[1]]] * 8]).all()


def test_one_slice_is_as_jax_makes_it():
    mesh = make_mesh({"data": 2, "fsdp": -1, "tensor": 1, "sequence": 1})
    expected = jax.make_mesh((2, 4, 1, 1), AXES)
    assert (mesh.devices == expected.devices).all()
