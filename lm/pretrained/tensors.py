"""How the tensors of a file become the parameters of one layer, and back.

D width, V vocabulary. A file keeps a linear weight as [out, in], the parameters as [in, out].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Arrays = Sequence[np.ndarray]


class Tensor(NamedTuple):
    """One tensor of a file and the parameters that it holds.

    Attributes:
      theirs: its name in the file, with {} for the number of the layer.
      ours: paths of the parameters, such as "layers/mlp/up".
      shape: (shapes of the parameters in one layer) -> shape of the tensor.
      split: (tensor, shapes of the parameters) -> the parameters. Views where it is possible.
      join: (the parameters) -> the tensor.
    """

    theirs: str
    ours: tuple[str, ...]
    shape: Callable[[Sequence[Shape]], Shape]
    split: Callable[[np.ndarray, Sequence[Shape]], Arrays]
    join: Callable[[Arrays], np.ndarray]


def same(theirs: str, ours: str) -> Tensor:
    """A tensor that is the parameter as it is: a vector, a table or a matrix [in, out]."""
    return Tensor(theirs, (ours,), lambda s: s[0], lambda w, _: (w,), lambda parts: parts[0])


def transposed(theirs: str, ours: str) -> Tensor:
    """A linear weight [out, in]."""
    return Tensor(theirs, (ours,), lambda s: s[0][::-1], lambda w, _: (w.T,), lambda p: p[0].T)


def stacked(theirs: str, *ours: str, transpose: bool = True) -> Tensor:
    """Parameters of one input, one after the other along the outputs.

    `transpose` is for weights [out, in]; without it they are [in, out], or biases [out].
    """

    def shape(shapes):
        total = (*shapes[0][:-1], sum(s[-1] for s in shapes))
        return total[::-1] if transpose else total

    def split(w, shapes):
        ends = np.cumsum([s[-1] for s in shapes])[:-1]
        return np.split(w.T if transpose else w, ends, axis=-1)

    def join(parts):
        joined = np.concatenate(parts, axis=-1)
        return joined.T if transpose else joined

    return Tensor(theirs, ours, shape, split, join)


def by_head(theirs: str, *ours: str, heads: int) -> Tensor:
    """Weights [out, in] or biases [out] of equal size, head by head: q0 k0 v0 q1 k1 v1 ..."""

    def shape(shapes):
        return (len(ours) * shapes[0][-1], *shapes[0][:-1])

    def split(w, shapes):
        apart = w.reshape(heads, len(ours), -1, *w.shape[1:])
        return [apart[:, i].reshape(shapes[i][::-1]).T for i in range(len(ours))]

    def join(parts):
        apart = [p.T.reshape(heads, -1, *p.T.shape[1:]) for p in parts]
        joined = np.stack(apart, axis=1)
        return joined.reshape(-1, *joined.shape[3:])

    return Tensor(theirs, ours, shape, split, join)
