"""GGUF files are read as the package `gguf` reads them; a damaged one is refused in one line."""

import builtins
import math
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.errors import InputError
from lm.pretrained.gguf_file import gguf_rows, llama_rows, read_gguf

FLOATS = ("F32", "F16", "BF16")
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
UINT32, STRING, ARRAY, BOOL = 4, 8, 9, 7


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def entry(name="w", dims=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_bytes(keys=(), entries=(), data=b"", magic=b"GGUF", version=3, counts=None, align=32):
    """A file by hand, so that what the writer of the package would refuse can be made."""
    counts = counts or (len(entries), len(keys))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *entries])
    return head + b"\0" * (-len(head) % align) + data


@pytest.fixture
def read(tmp_path):
    def read(content):
        (tmp_path / "x.gguf").write_bytes(content)
        return read_gguf(tmp_path / "x.gguf")

    return read


def quantized(kind, shape, rng):
    """(raw array for the writer, its type) of random values; valid random bytes for K-quants."""
    number = Type[kind]
    if kind in K_QUANTS:
        block, size = gguf.GGML_QUANT_SIZES[number]
        rows = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), np.uint8)
        # The float16 scales of a block lie at its end or its beginning: make all of them finite.
        for place in {0, 2} if kind in ("Q4_K", "Q5_K") else {size - 2, size - 4}:
            rows[..., place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
        return rows.reshape(*shape[:-1], -1)
    return gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), number)


def write(path):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.epsilon", 1e-5)
    writer.add_int64("negative", -(2**40))
    writer.add_float64("double", math.pi)
    writer.add_bool("yes", True)
    writer.add_string("tokenizer.chat_template", "{% é 🎈 %}\n")
    writer.add_array("tokens", ["<s>", "", "▁the"])
    writer.add_array("scores", [0.5, -1.0])
    writer.add_array("types", [1, 3, 4])
    writer.add_array("flags", [True, False])
    for kind in (*FLOATS, *QUANTIZED, *K_QUANTS):
        raw = quantized(kind, (3, 512), rng)
        writer.add_tensor(f"{kind}.weight", raw, raw_dtype=Type[kind])
    writer.add_tensor("cube", rng.normal(size=(2, 3, 4)).astype(np.float32))
    writer.add_tensor("vector", rng.normal(size=(5,)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_type_reads_as_the_package_dequantizes_it(tmp_path):
    write(tmp_path / "x.gguf")
    file = read_gguf(tmp_path / "x.gguf")
    reference = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert list(file.tensors) == list(reference)
    for name, tensor in file.tensors.items():
        theirs = reference[name]
        want = np.asarray(gguf.quants.dequantize(theirs.data, theirs.tensor_type))
        got = tensor.read()
        assert tensor.type == theirs.tensor_type.name
        assert tensor.shape == got.shape == tuple(theirs.shape[::-1].tolist())
        assert got.dtype == np.float32
        assert np.isfinite(got).all()
        assert np.ptp(got) > 0
        np.testing.assert_array_equal(got, want.reshape(got.shape))
    assert file.tensors["cube"].shape == (2, 3, 4)


def test_metadata_is_what_was_written(tmp_path):
    write(tmp_path / "x.gguf")
    metadata = read_gguf(tmp_path / "x.gguf").metadata
    scalars = {k: v for k, v in metadata.items() if not isinstance(v, list | np.ndarray)}
    assert scalars == {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.epsilon": float(np.float32(1e-5)),
        "negative": -(2**40),
        "double": math.pi,
        "yes": True,
        "tokenizer.chat_template": "{% é 🎈 %}\n",
    }
    assert metadata["yes"] is True
    assert metadata["tokens"] == ["<s>", "", "▁the"]
    assert metadata["scores"].tolist() == [0.5, -1.0]
    assert metadata["types"].tolist() == [1, 3, 4]
    assert metadata["flags"].dtype == bool
    assert metadata["flags"].tolist() == [True, False]


def test_version_2_and_arrays_of_arrays_are_read(read):
    inner = struct.pack("<IQ", UINT32, 2) + struct.pack("<II", 7, 8)
    nested = struct.pack("<IQ", ARRAY, 2) + inner + inner
    file = read(file_bytes([key("a", ARRAY, nested)], version=2))
    assert [part.tolist() for part in file.metadata["a"]] == [[7, 8], [7, 8]]


def test_another_alignment_moves_the_data(read):
    data = np.arange(4, dtype=np.float32).tobytes()
    for align in (1, 8, 64):
        keys = [key("general.alignment", UINT32, struct.pack("<I", align))]
        file = read(file_bytes(keys, [entry()], data, align=align))
        np.testing.assert_array_equal(file.tensors["w"].read(), np.arange(4))


SIXTEEN = bytes(16)
HUGE = 2**62
REFUSED = {
    "empty": (b"", "cut off"),
    "magic": (file_bytes(magic=b"GGML"), "not a GGUF file"),
    "version": (file_bytes(version=1), "version 1; valid are 2 and 3"),
    "big endian": (file_bytes(version=3 << 24), "big endian"),
    "keys": (file_bytes(counts=(0, HUGE)), f"metadata of {HUGE} keys needs"),
    "tensors": (file_bytes(counts=(HUGE, 0)), f"a list of {HUGE} tensors needs"),
    "key's length": (file_bytes([struct.pack("<Q", 2**63) + SIXTEEN]), "the name of key 0"),
    "string's length": (file_bytes([key("a", STRING, struct.pack("<Q", HUGE))]), "key 'a' needs"),
    "array's length": (
        file_bytes([key("a", ARRAY, struct.pack("<IQ", UINT32, HUGE))]),
        "key 'a' needs",
    ),
    "strings' count": (
        file_bytes([key("a", ARRAY, struct.pack("<IQ", STRING, 9) + bytes(60))], align=1),
        "an array of 9, needs 72",
    ),
    "arrays' count": (
        file_bytes([key("a", ARRAY, struct.pack("<IQ", ARRAY, 9) + bytes(80))], align=1),
        "an array of 9, needs 108",
    ),
    "nesting": (
        file_bytes([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9 + bytes(32))]),
        "more than 4 deep",
    ),
    "value's type": (file_bytes([key("a", 13, SIXTEEN)]), "a value of type 13"),
    "bool": (file_bytes([key("a", BOOL, b"\2")]), "neither 0 nor 1"),
    "key twice": (file_bytes([key("a", BOOL, b"\1")] * 2), "key 'a' is there twice"),
    "key's bytes": (file_bytes([key(b"\xff", BOOL, b"\1")]), "not UTF-8"),
    "value's bytes": (file_bytes([key("a", STRING, text(b"\xff"))]), "not UTF-8"),
    "line break": (file_bytes([key("a\nb", 13, SIXTEEN)]), r"key 'a\nb'"),
    "tensor twice": (file_bytes((), [entry(), entry()], SIXTEEN), "tensor 'w' is there twice"),
    "no dims": (file_bytes((), [entry(dims=())], SIXTEEN), "has 0 dims"),
    "five dims": (file_bytes((), [entry(dims=(1,) * 5)], SIXTEEN), "has 5 dims; valid are 1 to 4"),
    "zero": (file_bytes((), [entry(dims=(4, 0))], SIXTEEN), "the shape (0, 4)"),
    "negative": (file_bytes((), [entry(dims=(2**64 - 1,))], SIXTEEN), "cannot hold"),
    "overflow": (file_bytes((), [entry(dims=(2**32,) * 4)], SIXTEEN), "cannot hold"),
    "rows": (file_bytes((), [entry(dims=(16, 2), kind=2)], bytes(18)), "rows of 16, no multiple"),
    "type": (file_bytes((), [entry(kind=20)], SIXTEEN), "the type 20 (IQ4_NL); valid are F32"),
    "number": (file_bytes((), [entry(kind=99)], SIXTEEN), "the type 99 (unknown)"),
    "offset": (file_bytes((), [entry(offset=4)], bytes(64)), "begins at 4, no multiple of 32"),
    "end": (file_bytes((), [entry(offset=32)], bytes(47)), "ends at byte 48 of the data"),
    "far": (file_bytes((), [entry(offset=2**64 - 32)], SIXTEEN), "ends at byte"),
    "overlap": (
        file_bytes((), [entry("a"), entry("b", dims=(12,))], bytes(64)),
        "tensors 'a' and 'b' overlap",
    ),
    **{
        f"alignment {value}": (
            file_bytes([key("general.alignment", UINT32, struct.pack("<I", value))]),
            "general.alignment must be a power of two",
        )
        for value in (0, 24)
    },
    "alignment text": (
        file_bytes([key("general.alignment", STRING, text("32"))]),
        "general.alignment must be a power of two",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(name, read):
    content, reason = REFUSED[name]
    with pytest.raises(InputError) as caught:
        read(content)
    message = str(caught.value)
    assert reason in message
    assert "x.gguf: " in message
    assert "\n" not in message
    assert len(message) < 500


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(InputError, match="no such file"):
            read_gguf(path)


def tiny():
    strings = struct.pack("<IQ", STRING, 2) + text("ab") + text("é")
    nested = struct.pack("<IQIQ", ARRAY, 1, UINT32, 1) + struct.pack("<I", 7)
    keys = [
        key("general.alignment", UINT32, struct.pack("<I", 32)),
        key("s", STRING, text("x")),
        key("t", ARRAY, strings),
        key("n", ARRAY, nested),
        key("b", BOOL, b"\1"),
    ]
    entries = [entry("a", (2, 2)), entry("q", (32, 1), 2, 32)]
    return file_bytes(keys, entries, bytes(16) + bytes(16) + bytes(range(18)))


def test_a_file_cut_off_at_any_byte_is_refused(read):
    content = tiny()
    assert len(read(content).tensors) == 2
    for size in range(len(content)):
        with pytest.raises(InputError):
            read(content[:size])


def test_any_byte_may_change_and_memory_stays_small(read):
    content = tiny()
    refused = 0
    tracemalloc.start()
    for place in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(content)
            changed[place] ^= flip
            refused += not reads_or_refuses(read, bytes(changed))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > len(content)
    assert peak < 5e6


@given(
    st.lists(st.tuples(st.integers(0, len(tiny()) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(tiny())),
)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_several_bytes_may_change(read, changes, size):
    content = bytearray(tiny())
    for place, value in changes:
        content[place] = value
    reads_or_refuses(read, bytes(content[:size]))


def reads_or_refuses(read, content):
    try:
        file = read(content)
    except InputError:
        return False
    for tensor in file.tensors.values():
        assert tensor.read().shape == tensor.shape
    return True


def test_without_the_package_only_quantized_tensors_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "x.gguf")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    tensors = read_gguf(tmp_path / "x.gguf").tensors
    for kind in FLOATS:
        assert tensors[f"{kind}.weight"].read().shape == (3, 512)
    with pytest.raises(
        InputError, match=r"needs the package gguf: pip install 'nibble-lm\[gguf\]'"
    ):
        tensors["Q4_1.weight"].read()


@pytest.mark.parametrize(("heads", "shape"), [(3, (24, 5)), (1, (8, 2)), (2, (12,))])
def test_rows_of_q_and_k_go_to_gguf_and_back(heads, shape):
    w = np.random.default_rng(0).normal(size=shape)
    half = shape[0] // heads // 2
    there = gguf_rows(w, heads)
    want = w.reshape(heads, 2, half, *shape[1:]).swapaxes(1, 2).reshape(shape)
    np.testing.assert_array_equal(there, want)
    np.testing.assert_array_equal(llama_rows(there, heads), w)
    np.testing.assert_array_equal(gguf_rows(llama_rows(w, heads), heads), w)


def test_the_two_orders_of_rows_differ():
    # Heads of width 6: halves 0-2 and 3-5 are interleaved in GGUF.
    assert gguf_rows(np.arange(6), 1).tolist() == [0, 3, 1, 4, 2, 5]
    assert llama_rows(np.arange(6), 1).tolist() == [0, 2, 4, 1, 3, 5]


def test_rows_that_heads_do_not_divide_are_refused():
    for heads in (0, 4):
        with pytest.raises(InputError, match="6 rows of q or k"):
            llama_rows(np.zeros((6, 2)), heads)
