"""GGUF files against the package gguf, and damaged ones."""

import struct

import gguf
import numpy as np
import pytest
from hostile import flipped, peak_bytes, read_all, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.pretrained.gguf_file import TENSOR_TYPES, read_gguf
from lm.pretrained.gguf_names import gguf_rows, huggingface_rows

KINDS = [name for name, *_ in TENSOR_TYPES.values()]


def tensors_of(path):
    return read_gguf(path).tensors


def random_bytes(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of blocks, uint8 [rows, bytes]: the weights of a float type are small, not random."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if block == 1:
        x = rng.standard_normal((rows, columns)).astype(np.float32)
        return gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    return rng.integers(0, 256, (rows, columns // block * size), np.uint8)


def write_file(path, kinds, endianess=gguf.GGUFEndian.LITTLE, metadata=True):
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    if metadata:
        writer.add_uint32("a.count", 7)
        writer.add_float32("a.epsilon", 1e-5)
        writer.add_bool("a.yes", True)
        writer.add_array("a.texts", ["", "ab", "ü"])
        writer.add_array("a.numbers", [1, 2, 3])
        writer.add_string("a.text", "\U0001f600")
    for kind in kinds:
        content = random_bytes(kind, 3, 512)
        writer.add_tensor(kind, content, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_type_of_tensors_is_decoded_as_the_package_does(kind, tmp_path):
    path = write_file(tmp_path / "x.gguf", [kind])
    (theirs,) = gguf.GGUFReader(path).tensors
    expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    stored = tensors_of(path)[kind]
    found = stored.read()
    assert (stored.shape, stored.dtype) == ((3, 512), kind)
    np.testing.assert_array_equal(found.astype(np.float32), expected)
    # Another row is another result.
    assert not np.array_equal(found[0], found[1])


def test_types_and_sizes_of_blocks_are_those_of_the_package():
    for number, (name, weights, size) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (weights, size))


def test_metadata_is_read_as_it_was_written(tmp_path):
    found = read_gguf(write_file(tmp_path / "x.gguf", ["F32"])).metadata
    assert found["general.architecture"] == "llama"
    assert (found["a.count"], found["a.yes"], found["a.text"]) == (7, True, "\U0001f600")
    assert found["a.epsilon"] == 1e-5  # Not the nearest float32.
    assert found["a.texts"] == ["", "ab", "ü"]
    assert found["a.numbers"].tolist() == [1, 2, 3]


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    whole = write_file(tmp_path / "x.gguf", ["Q8_0", "F16"]).read_bytes()
    path = tmp_path / "cut.gguf"
    # Bytes that fill up the last tensor are no part of it: here there are none.
    for size in (*range(500), *range(500, len(whole), 37), len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(tensors_of, path)
    path.write_bytes(whole)
    assert read_all(tensors_of, path)


def test_random_damage_is_refused_or_harmless(tmp_path):
    whole = write_file(tmp_path / "x.gguf", ["Q8_0", "F16", "Q4_K"]).read_bytes()
    path = tmp_path / "damaged.gguf"
    read = 0
    for seed in range(1500):
        path.write_bytes(flipped(whole, seed, 440))
        read += read_all(tensors_of, path)
    assert 50 < read < 1200


def text(content: str | bytes) -> bytes:
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def raw(keys=(), tensors=(), data=b"", counts=None, version=3, magic=b"GGUF") -> bytes:
    """A file of keys (name, bytes of type and value) and tensors (name, dims, type, offset)."""
    count, number = counts or (len(tensors), len(keys))
    content = magic + struct.pack("<IQQ", version, count, number)
    for name, value in keys:
        content += text(name) + value
    for name, dims, kind, offset in tensors:
        content += text(name) + struct.pack("<I", len(dims))
        content += struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)
    return content + bytes(-len(content) % 32) + data


def uint32(value):
    return struct.pack("<II", 4, value)


def array(kind, count, content=b""):
    return struct.pack("<IIQ", 9, kind, count) + content


def alignment(value):
    return [("general.alignment", value)]


F32 = ("t", (4, 2), 0, 0)
HUGE, ROOM = 2**60, bytes(64)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a GGUF file"),
        (b"GGU", "not a GGUF file"),
        (raw(magic=b"GGML"), "not a GGUF file"),
        (raw(version=1), "version 1 of GGUF is not known; valid: 2 and 3"),
        (raw(version=3 << 24), "a big-endian GGUF file"),
        (raw(counts=(HUGE, 0)), "cut short or damaged"),
        (raw(counts=(0, HUGE)), "cut short or damaged"),
        (raw(counts=(2**64 - 1, 2**64 - 1)), "cut short or damaged"),
        (raw([("a", struct.pack("<IQ", 8, HUGE))]), "a text of 1,152,921,504,606,846,976 bytes"),
        (raw([("a", array(8, HUGE))]), "texts at byte"),
        (raw([("a", array(8, 2, struct.pack("<QQ", 0, HUGE)))]), "text 1 of 2"),
        (raw([("a", array(8, 1, text(b"\xff")))]), "text 0 of 1"),
        (raw([("a", array(12, HUGE))]), "numbers at byte"),
        (raw([("a", array(0, 2**64 - 1))]), "numbers at byte"),
        (raw([("a", array(9, 1, array(4, 1)))]), "a value of type 9"),
        (raw([("a", array(13, 1))]), "a value of type 13"),
        (raw([("a", struct.pack("<I", 13))]), "a value of type 13"),
        (raw([(b"\xff", uint32(1))]), "no UTF-8"),
        (raw([("a", uint32(1)), ("a", uint32(1))]), "the key a is there twice"),
        (raw([("\n", uint32(1)), ("\n", uint32(1))]), r"the key '\n' is there twice"),
        (raw(tensors=[("t", (), 0, 0)]), "has 0 dimensions"),
        (raw(tensors=[("t", (1,) * 5, 0, 0)]), "has 5 dimensions"),
        (raw(tensors=[("t", (4, 0), 0, 0)]), "has a dimension of 0"),
        (raw(tensors=[("t", (0, HUGE), 0, 0)]), "has a dimension of 0"),
        (raw(tensors=[("t", (HUGE,) * 4, 0, 0)]), "cut short or damaged"),
        (raw(tensors=[("t", (4,), 0, 2**64 - 32)], data=ROOM), "cut short or damaged"),
        (raw(tensors=[("t", (4,), 9, 0)], data=ROOM), "is of type 9; valid: F32"),
        (raw(tensors=[("t", (4,), 28, 0)], data=ROOM), "is of type 28; valid: F32"),
        (raw(tensors=[("t", (16, 2), 8, 0)], data=ROOM), "does not fill its blocks"),
        (raw(tensors=[F32, F32], data=ROOM), "is there twice"),
        (raw(tensors=[F32, ("t", (4, 2), 0, 32)], data=ROOM), "is there twice"),
        (raw(tensors=[F32, ("u", (4, 2), 0, 0)], data=ROOM), "overlaps another"),
        (raw(tensors=[("t", (9,), 0, 0), ("u", (4,), 0, 32)], data=ROOM), "overlaps another"),
        (raw(tensors=[("t", (4,), 0, 4)], data=ROOM), "overlaps another"),
        (raw(alignment(uint32(0)), [F32], ROOM), "general.alignment=0 must be a power of two"),
        (raw(alignment(uint32(24)), [F32], ROOM), "general.alignment=24"),
        (raw(alignment(uint32(2**31)), [F32], ROOM), "cut short or damaged"),
        (raw(alignment(struct.pack("<IB", 7, 1)), [F32], ROOM), "general.alignment=True"),
        (raw(alignment(array(4, 1, b"\0" * 4)), [F32], ROOM), "general.alignment="),
    ],
    ids=range(39),
)
def test_headers_that_lie_are_refused_without_taking_memory(content, expected, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert peak_bytes(lambda: refused(read_gguf, path, expected)) < 100_000


def test_only_files_are_read(tmp_path):
    refused(read_gguf, tmp_path / "nothing", "No such file")
    refused(read_gguf, tmp_path, "not a file")
    big = write_file(tmp_path / "x.gguf", ["F32"], gguf.GGUFEndian.BIG)
    refused(read_gguf, big, "a big-endian GGUF file")


def test_lists_of_texts_take_no_memory_of_the_tensors_behind_them(tmp_path):
    """One hundred lists before 8 MB of tensors, which a reader could copy for each of them."""
    keys = [(f"k{i}", array(8, 1, text("x"))) for i in range(100)]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw(keys, [("t", (2**21,), 0, 0)], bytes(2**23)))
    assert peak_bytes(lambda: read_all(tensors_of, path)) < 500_000


@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 5),
    width=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_rows_of_queries_are_ordered_as_llama_cpp_orders_them(heads, half, width):
    shape = (heads * 2 * half, *([width] if width else []))  # 0: a bias.
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    # LlamaModel.permute of convert_hf_to_gguf.py in llama.cpp.
    theirs = w.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    np.testing.assert_array_equal(gguf_rows(w, heads), theirs)
    np.testing.assert_array_equal(huggingface_rows(theirs, heads), w)
    # Its inverse is itself for heads of two pairs or one only.
    assert (half > 2) == (not np.array_equal(huggingface_rows(w, heads), theirs))
