"""Safetensors files against the library, and damaged ones."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from hostile import flipped, peak_bytes, read_all, refused
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lm.pretrained.safetensors_file import open_safetensors

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def raw(header, data=b"", length=None) -> bytes:
    """A file with this header, a text or an object, and these bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def write(tmp_path, content: bytes):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small file: all types, a scalar and a tensor without elements."""
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal((3, 5)).astype(t) for i, t in enumerate(TYPES)}
    tensors |= {"scalar": np.array(7, np.float32), "empty": np.zeros((0, 4), np.float16)}
    path = tmp_path_factory.mktemp("whole") / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return path.read_bytes()


def test_every_type_is_read_as_the_library_reads_it(tmp_path, whole):
    path = write(tmp_path, whole)
    expected, found = load_file(path), open_safetensors(path)
    assert found.keys() == expected.keys()
    for name, stored in found.items():
        array = stored.read()
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert array.tobytes() == expected[name].tobytes()
    assert {str(np.dtype(t)) for t in TYPES} == {str(x.read().dtype) for x in found.values()}


def test_a_file_cut_at_any_byte_is_refused(tmp_path, whole):
    assert read_all(open_safetensors, write(tmp_path, whole))
    for size in range(len(whole)):
        refused(open_safetensors, write(tmp_path, whole[:size]))
    refused(open_safetensors, write(tmp_path, whole + b"\0"), "bytes of tensors")


def test_random_damage_is_refused_or_harmless(tmp_path, whole):
    header = 8 + int.from_bytes(whole[:8], "little")
    read = sum(
        read_all(open_safetensors, write(tmp_path, flipped(whole, seed, header)))
        for seed in range(1500)
    )
    assert 0 < read < 750


BOMB = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
TWICE = f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}'.encode()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a whole safetensors file"),
        (b"\2\0\0\0\0\0\0", "not a whole safetensors file"),
        (raw(b"{}", length=2**63), "not a whole safetensors file"),
        (raw(b"{}", length=3), "not a whole safetensors file"),
        (raw(b"{}", length=1), "not a whole safetensors file"),
        (raw(b"\xff\xfe"), "is not JSON"),
        (raw(b"[]"), "not a JSON object"),
        (raw(BOMB), "is not JSON"),
        (raw(TWICE, bytes(8)), "a key twice"),
        (raw(b'{"a":' + b"9" * 5000 + b"}"), "is not JSON"),
        (raw({"a": 3}), "not that of a tensor"),
        (raw({"a": entry(more=1)}, bytes(8)), "not that of a tensor"),
        (raw({"a\n\x1b[31m\ud800": 3}), "not that of a tensor"),
        (raw({"a" * 10_000: 3}), "not that of a tensor"),
        (raw({"a": entry([-2])}, bytes(8)), "whole numbers"),
        (raw({"a": entry([2.0])}, bytes(8)), "whole numbers"),
        (raw({"a": entry([True, 2])}, bytes(8)), "whole numbers"),
        (raw({"a": entry("2")}, bytes(8)), "whole numbers"),
        (raw({"a": entry([1] * 10_000)}, bytes(8)), "up to 8 whole numbers"),
        (raw({"a": entry([2**53])}, bytes(8)), "whole numbers"),
        (raw({"a": entry([2**52] * 8)}, bytes(8)), "too large"),
        (raw({"a": entry([0, 2**52, 2**52], [0, 0])}), "too large"),
        (raw({"a": entry([2**50])}, bytes(8)), "cut short or damaged"),
        (raw({"a": entry(offsets=[float("inf"), 8])}, bytes(8)), "whole numbers"),
        (raw({"a": entry(offsets=["0", "8"])}, bytes(8)), "whole numbers"),
        (raw({"a": entry(offsets=[0])}, bytes(8)), "cut short or damaged"),
        (raw({"a": entry(offsets=[8, 0])}, bytes(8)), "cut short or damaged"),
        (raw({"a": entry(offsets=[4, 12])}, bytes(12)), "cut short or damaged"),
        (raw({"a": entry(), "b": entry()}, bytes(16)), "cut short or damaged"),
        (raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "cut short"),
        (raw({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "cut short"),
        (raw({"a": entry(), "b": entry(offsets=[8, 16])}, bytes(8)), "cut short"),
        (raw({"a": entry(dtype="I64", shape=[1])}, bytes(8)), "of type I64; valid: F32"),
        (raw({"a": entry(dtype="F64", shape=[1])}, bytes(8)), "of type F64"),
        (raw({"a": entry(dtype="F8_E4M3", shape=[8])}, bytes(8)), "of type F8_E4M3"),
        (raw({"a": entry(dtype=["F32"])}, bytes(8)), "of type ['F32']"),
        (raw({"a": entry(dtype={})}, bytes(8)), "of type {}"),
    ],
    ids=range(37),
)
def test_headers_that_lie_are_refused_without_taking_memory(content, expected, tmp_path):
    path = write(tmp_path, content)
    peak = peak_bytes(lambda: refused(open_safetensors, path, expected))
    assert peak < 20 * len(content) + 200_000


def test_only_files_are_read(tmp_path):
    refused(open_safetensors, tmp_path / "nothing", "No such file")
    refused(open_safetensors, tmp_path, "not a file")
    os.mkfifo(tmp_path / "pipe")
    refused(open_safetensors, tmp_path / "pipe", "not a file")


def test_a_tensor_without_elements_may_share_its_place_with_another(tmp_path):
    header = {"b": entry(), "a": entry([0, 3], [8, 8]), "c": entry([0], [0, 0])}
    path = write(tmp_path, raw(header, bytes(8)))
    found = open_safetensors(path)
    assert {n: s.shape for n, s in found.items()} == {"c": (0,), "b": (2,), "a": (0, 3)}
    with safe_open(path, "numpy") as library:
        assert library.get_tensor("a").shape == found["a"].read().shape


def test_opening_a_large_file_reads_no_tensor(tmp_path):
    size = 2**32
    path = write(tmp_path, raw({"a": entry([size // 4], [0, size])}))
    os.truncate(path, path.stat().st_size + size)  # A sparse file.
    assert peak_bytes(lambda: open_safetensors(path)["a"].read()[-1]) < 200_000
