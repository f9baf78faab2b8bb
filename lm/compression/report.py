"""What quantization did to each matrix of a model: errors, outliers, codes, scales and bytes.

Numbers only; `launch.quantization_page` shows them. I inputs and O outputs of a matrix.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.compression.after_training import PostTrained
from lm.compression.integer_grids import levels
from lm.compression.packed import Coded
from lm.model.parameters import LAYERS, parameter_kind, path_of
from lm.parallel.mesh import to_host
from objectives.quantization import Grid, Mixed, packed_size
from objectives.quantization.mixed import quantizer_of_layer

KINDS = ("matrix", "embedding", "head", "other")

WEIGHT_BINS = 64
# Weights are counted within this many root mean squares of 0.
WEIGHT_REACH = 6.0
SCALE_BINS = 32

# Weights that are float64 at a time.
_BLOCK = 1 << 22


class Histogram(NamedTuple):
    """Counts of values in bins of one width.

    Attributes:
      edges: float64 [bins + 1], increasing.
      counts: int64 [bins]; the last bin holds its right edge, too.
    """

    edges: np.ndarray
    counts: np.ndarray


class Size(NamedTuple):
    """Bytes as `packed.write_packed` stores them, without the header.

    Attributes:
      parameters: number of weights.
      before: bytes of the weights as they were.
      codes: bytes of packed codes.
      scales: bytes of scales, and of the codes of 0 of asymmetric grids.
      exact_zeros: bytes of the positions of weights that are 0 whatever their code.
      kept: bytes of weights that are not quantized.
    """

    parameters: int = 0
    before: int = 0
    codes: int = 0
    scales: int = 0
    exact_zeros: int = 0
    kept: int = 0

    @property
    def after(self) -> int:
        """All bytes that are stored."""
        return self.codes + self.scales + self.exact_zeros + self.kept

    @property
    def bits_per_weight(self) -> float:
        """8 * after / parameters; 0 without parameters."""
        return 8 * self.after / self.parameters if self.parameters else 0.0

    def plus(self, other: "Size") -> "Size":
        """The sums of all fields."""
        return Size(*(a + b for a, b in zip(self, other, strict=True)))


class Layer(NamedTuple):
    """A quantized matrix W of one layer with its quantized values Q.

    Attributes:
      index: of the layer; None where the matrix is not part of a stack.
      bits: width of its codes.
      error: |W - Q|^2 / |W|^2; 0 for zeros that are quantized to zeros, as in
        `objectives.quantization.quantization_error`.
      outermost: share of weights with the code of the smallest or of the largest value that is in
        use. (On a symmetric integer grid with its scale from the data, the lowest code is not.)
      outlier: max |w| / rms, rms^2 the mean of w^2; 0 for zeros.
      rms: root mean square of W, or 1 for zeros.
      weights: histogram of W in `WEIGHT_BINS` bins from -6 to 6 rms.
      beyond: number of weights outside of these bins.
      code_counts: int64 [levels], how often each code is used.
      code_means: float64 [levels], mean of Q over the weights with that code, NaN for unused ones.
      scales: histogram of log2 |scale|, without scales of 0; its edges are those of all layers.
      size: bytes. Codes of a stack are packed without a gap: a layer has the bytes up to its end
        less those up to its start, so that the bytes of all layers add up to those stored.
    """

    index: int | None
    bits: float
    error: float
    outermost: float
    outlier: float
    rms: float
    weights: Histogram
    beyond: int
    code_counts: np.ndarray
    code_means: np.ndarray
    scales: Histogram
    size: Size


class Matrix(NamedTuple):
    """A quantized leaf: a matrix, or a stack of the same matrix of all layers.

    Attributes:
      path: such as "layers/mlp/up".
      quantizer: name of its factory.
      granularity: "tensor", "channel" or "group".
      group_size: inputs in a group, 0 without groups.
      layers: one for each layer; a single one where there is no stack.
    """

    path: str
    quantizer: str
    granularity: str
    group_size: int
    layers: tuple[Layer, ...]

    @property
    def size(self) -> Size:
        """Of all layers."""
        return functools.reduce(Size.plus, (layer.size for layer in self.layers), Size())


class Description(NamedTuple):
    """Result of `describe`.

    Attributes:
      matrices: the quantized leaves, in the order of the parameters' tree.
      groups: kind of parameter, one of `KINDS`, -> bytes; "other" are vectors and adapters.
      total: bytes of all.
    """

    matrices: tuple[Matrix, ...]
    groups: dict[str, Size]
    total: Size


def describe(params: Any, result: PostTrained) -> Description:
    """Compares a model's weights before quantization with those on their grids.

    Of the weights one matrix of one layer is on the host at a time. All processes have to call it.

    Args:
      params: before quantization.
      result: of `after_training`, for the same parameters.
    """
    groups = {kind: Size() for kind in KINDS}
    matrices = []
    for keys, weights in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        if path in result.coded:
            matrices.append(_matrix(path, weights, result.coded[path]))
            size = matrices[-1].size
        else:
            size = Size(weights.size, weights.nbytes, kept=weights.nbytes)
        kind = parameter_kind(path)
        kind = kind if kind in KINDS else "other"
        groups[kind] = groups[kind].plus(size)
    return Description(
        tuple(matrices), groups, functools.reduce(Size.plus, groups.values(), Size())
    )


def _matrix(path: str, weights: Any, coded: Coded) -> Matrix:
    quantizer, edges = coded.quantizer, _scale_edges(coded)
    stacked = path.startswith(f"{LAYERS}/")
    layers = tuple(
        _layer(index, part, w_IO, edges, bytes_of_codes)
        for index, part, w_IO, bytes_of_codes in _parts(weights, coded, stacked)
    )
    return Matrix(path, quantizer.name, quantizer.granularity, quantizer.group_size, layers)


def _parts(
    weights: Any, coded: Coded, stacked: bool
) -> Iterator[tuple[int | None, Coded, np.ndarray, int]]:
    """(index, its codes and grid, its weights on the host, bytes of its codes) of every layer."""
    if not stacked:
        whole = coded._replace(codes=_host(coded.codes), grid=_grid(coded.grid))
        yield None, whole, _host(weights), packed_size(whole.codes.size, coded.quantizer.bits)
        return
    count = math.prod(weights.shape[1:])
    for i in range(weights.shape[0]):
        low, high = np.searchsorted(coded.exact_zeros, (i * count, (i + 1) * count))
        quantizer = quantizer_of_layer(coded.quantizer, i)
        part = coded._replace(
            quantizer=quantizer,
            codes=_host(coded.codes, i),
            grid=_grid(coded.grid, i),
            exact_zeros=coded.exact_zeros[low:high] - i * count,
        )
        # The codes of a stack of one width are packed without a gap.
        size = packed_size(count, quantizer.bits)
        if not isinstance(coded.quantizer, Mixed):
            start = packed_size(i * count, quantizer.bits)
            size = packed_size((i + 1) * count, quantizer.bits) - start
        yield i, part, _host(weights, i), size


def _layer(index: int | None, coded: Coded, w_IO: np.ndarray, edges: Any, code_bytes: int) -> Layer:
    codes = coded.codes.reshape(-1)
    w, q = w_IO.reshape(-1), np.asarray(coded.decode()).reshape(-1)
    total = coded.quantizer.levels
    squares = errors = largest = 0.0
    counts, sums = np.zeros(total, np.int64), np.zeros(total)
    for block in _blocks(w.size):
        w64, q64 = w[block].astype(np.float64), q[block].astype(np.float64)
        squares += np.square(w64).sum()
        errors += np.square(w64 - q64).sum()
        largest = max(largest, np.abs(w64).max())
        counts += np.bincount(codes[block], minlength=total)
        sums += np.bincount(codes[block], q64, minlength=total)
    rms = math.sqrt(squares / w.size) or 1.0
    weights = _count((w[block] for block in _blocks(w.size)), _weight_edges(rms))
    scales = sum(part.nbytes for part in coded.grid if part is not None)
    size = Size(w.size, w.nbytes, code_bytes, scales, coded.exact_zeros.nbytes)
    return Layer(
        index=index,
        bits=coded.quantizer.bits,
        error=errors / (squares or 1.0),
        outermost=_outermost(coded, counts) / w.size,
        outlier=largest / rms,
        rms=rms,
        weights=weights,
        beyond=w.size - int(weights.counts.sum()),
        code_counts=counts,
        code_means=np.divide(sums, counts, out=np.full(total, np.nan), where=counts > 0),
        scales=_count([_log2(coded.grid.scale)], edges),
        size=size,
    )


def _outermost(coded: Coded, counts: np.ndarray) -> int:
    """How many weights have the lowest or the highest value of those in use."""
    used = np.flatnonzero(counts)
    values = levels(coded)[used]
    return int(sum(counts[code] for code in {used[values.argmin()], used[values.argmax()]}))


def _weight_edges(rms: float) -> np.ndarray:
    return np.linspace(-WEIGHT_REACH * rms, WEIGHT_REACH * rms, WEIGHT_BINS + 1)


def _scale_edges(coded: Coded) -> np.ndarray:
    """Edges from one power of two to another, around the scales of all layers."""
    found = _log2(_host(coded.grid.scale))
    low, high = (found.min(), found.max()) if found.size else (0.0, 0.0)
    low = math.floor(low)
    return np.linspace(low, max(math.ceil(high), low + 1), SCALE_BINS + 1)


def _log2(scale: np.ndarray) -> np.ndarray:
    sizes = np.abs(np.asarray(scale, np.float64))
    return np.log2(sizes[sizes > 0])


def _count(blocks: Any, edges: np.ndarray) -> Histogram:
    counts = np.zeros(len(edges) - 1, np.int64)
    for block in blocks:
        # Given as a range, bins of one width take no search.
        counts += np.histogram(block.astype(np.float64), len(counts), (edges[0], edges[-1]))[0]
    return Histogram(edges, counts)


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _host(leaf: Any, index: int | None = None) -> np.ndarray:
    """A leaf, or one layer of a stack, on the host."""
    if isinstance(leaf, np.ndarray):
        return leaf if index is None else leaf[index]
    return to_host(leaf if index is None else _one(leaf, index))


def _grid(grid: Grid, index: int | None = None) -> Grid:
    return Grid(*(None if part is None else _host(part, index) for part in grid))


@jax.jit
def _one(leaf: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
