"""A trained model as one safetensors file: integer codes without a bit to spare, scales, config.

Tensors of a quantized leaf at PATH, "layers/mlp/up" for instance; other leaves are stored as PATH:

    PATH.codes         uint8, of `objectives.quantization.pack`, in C order of the leaf's shape
    PATH.scale         float32, see `objectives.quantization.Grid`
    PATH.zero          float32, the code of 0, for asymmetric grids only
    PATH.exact_zeros   int64, positions of weights that are exactly 0 on a grid that has no code
                       for 0 (elastic_binary with zero_sign=0), if there are any

The scales of a quantized cache are one leaf more, scales/cache, float32 [layers, kv heads, 1, head
width].

The header's metadata (strings, JSON but for the first, the tokenizer and its template): `format`,
`version`, `config`, `vocab_size`, `tokenizer` (a tokenizer.json, or "" for bytes), `chat_template`,
`step`, `quantizers`, `leaves` (path -> shape, dtype and index of its quantizer or null),
`checksums` (CRC-32 of each tensor) and `checksum` (that of the other metadata).

The version is 1, or 2 where layers of one leaf have several quantizers: the leaf then has a list of
their indices, one a layer, and its codes are those of `objectives.quantization.pack_layers`.
"""

import contextlib
import functools
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lm import strict_json
from lm.compression.cache import KEYS, of_parameters
from lm.errors import InputError
from objectives.quantization import (
    QUANTIZERS,
    Grid,
    Mixed,
    Quantizer,
    mixed,
    pack,
    pack_layers,
    packed_layers_size,
    packed_size,
    quantizer_of_layer,
    settle,
    unpack,
    unpack_layers,
)
from objectives.quantization.qat import Rules

FORMAT = "nibble packed model"
VERSION = 1
# With a leaf whose layers have several quantizers.
MIXED_VERSION = 2

# Where the leaves of a file have the scales of a quantized cache.
KEY_SCALES = f"scales/{KEYS}"

_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class Coded(NamedTuple):
    """A matrix, or a stack of them, on the grid of a quantizer.

    Attributes:
      quantizer: its `decode` gives the weights back. Of a stack with several widths it is a
        `Mixed`, whose `layers` are those of the codes.
      codes: uint8 [..., I, O].
      grid: scales (and zeros) of `codes`.
      dtype: of the weights.
      exact_zeros: int64 positions in the flat array of weights that are 0 whatever their code.
    """

    quantizer: Quantizer | Mixed
    codes: Any
    grid: Grid
    dtype: Any
    exact_zeros: np.ndarray = np.zeros(0, np.int64)

    def decode(self) -> jax.Array:
        """The weights, [..., I, O]."""
        weights = _decode(self.quantizer, self.codes, self.grid).astype(self.dtype)
        if not len(self.exact_zeros):
            return weights
        return weights.reshape(-1).at[self.exact_zeros].set(0).reshape(weights.shape)

    def layers(self) -> list["Coded"]:
        """The layers of a stack one by one, each with its own quantizer."""
        found, size = [], int(np.prod(self.codes.shape[1:]))
        for i, codes in enumerate(self.codes):
            grid = jax.tree.map(lambda x, i=i: x[i], self.grid)
            of_layer = self.exact_zeros[self.exact_zeros // size == i] % size
            quantizer = quantizer_of_layer(self.quantizer, i)
            found.append(Coded(quantizer, codes, grid, self.dtype, of_layer))
        return found


class Packed(NamedTuple):
    """What `read_packed` finds in a file.

    Attributes:
      config: of the run, as plain dictionaries.
      vocab_size: of the model.
      tokenizer: the content of its tokenizer.json, or "" for bytes.
      step: of the checkpoint.
      params: the parameters, quantized leaves on their grids.
      quantizers: path -> the quantizer of each quantized leaf.
      coded: path -> codes and grid of each quantized leaf.
      chat_template: of the tokenizer, "" for none.
      key_scales: of a quantized cache, float32 [L, K, 1, H]; None for none.
    """

    config: dict[str, Any]
    vocab_size: int
    tokenizer: str
    step: int
    params: Any
    quantizers: dict[str, Quantizer | Mixed]
    coded: dict[str, Coded]
    chat_template: str = ""
    key_scales: jax.Array | None = None


@functools.partial(jax.jit, static_argnums=0)
def _decode(quantizer: Quantizer | Mixed, codes, grid: Grid):
    return quantizer.decode(codes, grid)


@functools.partial(jax.jit, static_argnums=0)
def _code(quantizer: Quantizer | Mixed, weights, scale):
    grid = quantizer.grid(weights, scale)
    codes = quantizer.encode(weights, grid)
    zeros = (quantizer.quantize(weights, scale) == 0) & (quantizer.decode(codes, grid) != 0)
    return codes, grid, zeros, jnp.isfinite(weights).all()


def code_leaves(params: Any, scales: Any, rules: Rules) -> Iterator[tuple[str, Any]]:
    """(path, `Coded`, or the array where no quantizer is at work) of every leaf, one at a time.

    What is decoded equals `quantize_tree(params, scales, rules)`, the sign of a zero aside. Last
    come the scales of a quantized cache, if there are any, at `KEY_SCALES`.

    Args:
      params: the parameters.
      scales: of `init_scales`, or trained, perhaps with those of a cache.
      rules: the same as there.

    Raises:
      InputError: a leaf with weights that are not finite, which have no code.
      ValueError: a leaf that no rule covers, or whose shape does not fit its quantizer.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    of_leaves = structure.flatten_up_to(of_parameters(scales))
    for (path, weights), scale in zip(leaves, of_leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        quantizer = rules(name)
        if quantizer is None:
            yield name, weights
            continue
        quantizer, scale = settle(quantizer, scale)
        codes, grid, zeros, finite = _code(quantizer, weights, scale)
        if not finite:
            raise InputError(f"parameter {name} has weights that are not finite: no codes for them")
        yield name, Coded(quantizer, codes, grid, weights.dtype, np.flatnonzero(zeros))
    if KEYS in scales:
        yield KEY_SCALES, scales[KEYS]


def write_packed(
    path: str | os.PathLike,
    leaves: Iterable[tuple[str, Any]],
    *,
    config: dict[str, Any],
    vocab_size: int,
    tokenizer: str,
    chat_template: str = "",
    step: int,
) -> int:
    """Writes the file, under a temporary name until it is whole; returns its size in bytes.

    Leaves are taken one at a time: besides them, the packed codes are all that is in memory.

    Args:
      path: a local file; one that exists is replaced.
      leaves: of `code_leaves`, or pairs like these.
      config: see `Packed`, as the rest.
      vocab_size: see there.
      tokenizer: see there.
      chat_template: see there.
      step: see there.

    Raises:
      InputError: the file cannot be written.
    """
    tensors, described, quantizers = {}, {}, []
    for name, leaf in leaves:
        entry = {"quantizer": None}
        if isinstance(leaf, Coded):
            entry = {"quantizer": _describe(leaf.quantizer, quantizers)}
            tensors[f"{name}.codes"] = _pack(leaf.quantizer, np.asarray(leaf.codes))
            tensors[f"{name}.scale"] = np.asarray(leaf.grid.scale)
            if leaf.grid.zero is not None:
                tensors[f"{name}.zero"] = np.asarray(leaf.grid.zero)
            if len(leaf.exact_zeros):
                tensors[f"{name}.exact_zeros"] = leaf.exact_zeros
            shape, dtype = leaf.codes.shape, leaf.dtype
        else:
            tensors[name] = np.asarray(leaf)
            shape, dtype = leaf.shape, leaf.dtype
        described[name] = {"shape": list(shape), "dtype": np.dtype(dtype).name, **entry}
    metadata = {
        "format": FORMAT,
        "version": str(_version(described)),
        "config": strict_json.dumps(config),
        "vocab_size": str(vocab_size),
        "tokenizer": tokenizer,
        "chat_template": chat_template,
        "step": str(step),
        "quantizers": strict_json.dumps(quantizers),
        "leaves": strict_json.dumps(described),
        "checksums": strict_json.dumps({name: _checksum(array) for name, array in tensors.items()}),
    }
    metadata["checksum"] = str(_checksum_of_text(metadata))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: cannot be written: {' '.join(str(error).split())}") from None
    return path.stat().st_size


def read_packed(path: str | os.PathLike) -> Packed:
    """The model that `write_packed` wrote, leaf by leaf.

    Raises:
      InputError: no such file, or it is not a whole packed model of a version that is known.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            return _read(file, path)
    except SafetensorError as error:
        reason = f"not a whole safetensors file ({' '.join(str(error).split())})"
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        # Whatever a header makes of itself that is JSON, but not ours.
        reason = f"damaged ({type(error).__name__}: {' '.join(str(error).split())})"
    raise InputError(f"{path}: {reason}")


def _read(file, path) -> Packed:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: a safetensors file, but not a packed model of launch.quantize")
    if metadata.get("version") not in (str(VERSION), str(MIXED_VERSION)):
        version, known = metadata.get("version"), f"{VERSION} and {MIXED_VERSION}"
        raise InputError(f"{path}: format version {version}; this program reads {known}")
    if int(metadata.pop("checksum")) != _checksum_of_text(metadata):
        raise InputError(f"{path}: damaged (the checksum of the header's metadata is wrong)")
    checksums = strict_json.loads(metadata["checksums"])

    def tensor(name):
        array = file.get_tensor(name)
        if _checksum(array) != checksums[name]:
            raise InputError(f"{path}: damaged (the checksum of {name} is wrong)")
        return array

    quantizers = [
        QUANTIZERS[rule.pop("name")](**rule) for rule in strict_json.loads(metadata["quantizers"])
    ]
    params, of_leaf, coded = {}, {}, {}
    for name, leaf in strict_json.loads(metadata["leaves"]).items():
        shape, dtype = tuple(leaf["shape"]), _DTYPES[leaf["dtype"]]
        if leaf["quantizer"] is None:
            array = jnp.asarray(tensor(name))
        else:
            quantizer = of_leaf[name] = _quantizer(leaf["quantizer"], quantizers, shape)
            optional = {
                part: tensor(f"{name}.{part}")
                for part in ("zero", "exact_zeros")
                if f"{name}.{part}" in checksums
            }
            grid = Grid(tensor(f"{name}.scale"), optional.pop("zero", None))
            codes = _unpack(quantizer, tensor(f"{name}.codes"), shape)
            coded[name] = Coded(quantizer, codes, grid, dtype, **optional)
            array = coded[name].decode()
        if (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(f"{name} is {array.dtype}{array.shape}, not {leaf}")
        *parents, last = name.split("/")
        node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)
        node[last] = array
    key_scales = params.pop("scales", {}).get(KEYS)
    return Packed(
        strict_json.loads(metadata["config"]),
        int(metadata["vocab_size"]),
        metadata["tokenizer"],
        int(metadata["step"]),
        params,
        of_leaf,
        coded,
        metadata.get("chat_template", ""),
        key_scales,
    )


def stored_bytes(quantizer: Quantizer | Mixed | None, leaf: Any) -> int:
    """Bytes of the tensors of a leaf in a file, exact zeros aside.

    Args:
      quantizer: None for a leaf that is not quantized.
      leaf: the leaf, or its shape and dtype.
    """
    if quantizer is None:
        return math.prod(leaf.shape) * leaf.dtype.itemsize
    grid = jax.eval_shape(lambda w: quantizer.grid(w, quantizer.init(w)), leaf)
    scales = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(grid))
    if isinstance(quantizer, Mixed):
        return packed_layers_size(math.prod(leaf.shape[1:]), quantizer.widths) + scales
    return packed_size(math.prod(leaf.shape), quantizer.bits) + scales


def _pack(quantizer: Quantizer | Mixed, codes: np.ndarray) -> np.ndarray:
    if isinstance(quantizer, Mixed):
        return pack_layers(codes, quantizer.widths)
    return pack(codes, quantizer.bits)


def _unpack(quantizer: Quantizer | Mixed, packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(quantizer, Mixed):
        return unpack_layers(packed, quantizer.widths, shape)
    return unpack(packed, quantizer.bits, shape)


def _version(described: dict[str, dict[str, Any]]) -> int:
    several = any(isinstance(leaf["quantizer"], list) for leaf in described.values())
    return MIXED_VERSION if several else VERSION


def _describe(quantizer: Quantizer | Mixed, quantizers: list[dict[str, Any]]) -> int | list[int]:
    """The index of a quantizer in the list of all, which it is added to; a list of a stack.

    What `decode` depends on is said; options that only choose a scale or a code are left out.
    """
    if isinstance(quantizer, Mixed):
        return [_describe(quantizer.members[i], quantizers) for i in quantizer.layers]
    fields = ("name", "bits", "granularity", "group_size", "contraction_axis")
    rule = {field: getattr(quantizer, field) for field in fields}
    if rule not in quantizers:
        quantizers.append(rule)
    return quantizers.index(rule)


def _quantizer(
    described: int | list[int], quantizers: list[Quantizer], shape: tuple[int, ...]
) -> Quantizer | Mixed:
    """The inverse of `_describe`."""
    if not isinstance(described, list):
        return quantizers[described]
    if len(shape) != 3 or len(described) != shape[0]:
        raise ValueError(f"{len(described)} quantizers for the layers of a leaf {shape}")
    return mixed([quantizers[i] for i in described])


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _checksum_of_text(metadata: dict[str, str]) -> int:
    return zlib.crc32(strict_json.dumps(metadata, sort_keys=True).encode())
