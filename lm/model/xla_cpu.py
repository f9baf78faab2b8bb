"""Code that is written for XLA on CPU, each piece with the plain form that other platforms get.

The forms for CPU give the same values and the same gradients up to rounding. They use custom
gradients, optimization barriers and conditionals, which would only disturb other compilers, and
custom gradients cannot be differentiated in forward mode. `is_on` decides while a program is
traced. What each form saves is measured in docs/speed.md.
Options of the compiler are those of lm/parallel/compiler.py.

M rows, D width in, F width out.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm.model.platform import platform

_PLAIN = contextvars.ContextVar("plain_autodiff", default=False)

_GELU_SLOPE = (2 / math.pi) ** 0.5
_GELU_CUBIC = 0.044715


@contextlib.contextmanager
def plain_autodiff(plain: bool = True) -> Iterator[None]:
    """Within it, what is traced has no custom gradients: the key `model.plain_autodiff`."""
    token = _PLAIN.set(plain)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether the code being traced must do without custom gradients."""
    return _PLAIN.get()


def is_on() -> bool:
    """Whether the code being traced takes the forms of this module."""
    return platform() == "cpu" and not is_plain()


def gelu(x: jax.Array) -> jax.Array:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (arXiv 1606.08415, section 2).

    The backward pass keeps x alone and computes the tanh once more. On CPU its gradient is written
    out; elsewhere `jax.checkpoint` does the same.
    """
    if not is_on():
        return jax.checkpoint(jax.nn.gelu, prevent_cse=False)(x)
    return _gelu(x)


@jax.custom_vjp
def _gelu(x):
    return jax.nn.gelu(x)


def _gelu_forward(x):
    return _gelu(x), x


def _gelu_backward(x, slope):
    square = jnp.square(x)
    t = jnp.tanh(_GELU_SLOPE * x * (1 + _GELU_CUBIC * square))
    inner = _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * square)
    return (slope * 0.5 * (1 + t + x * (1 - jnp.square(t)) * inner),)


_gelu.defvjp(_gelu_forward, _gelu_backward)


def multiply(x_BTD: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x @ w, [B, T, F].

    On CPU it is a product of two matrices, rows and tokens merged: XLA would otherwise transpose
    the gradient of a three-dimensional product inside the elementwise pass before it. Its gradient
    x^T y for the weights contracts the rows of both sides, which goes to slow kernels there, so the
    narrower side is transposed before.
    """
    if not is_on():
        return x_BTD @ w_DF
    return _multiply(x_BTD.reshape(-1, w_DF.shape[0]), w_DF).reshape(*x_BTD.shape[:2], -1)


@jax.custom_vjp
def _multiply(x_MD, w_DF):
    return x_MD @ w_DF


def _multiply_backward(residuals, y_MF):
    x_MD, w_DF = residuals
    # Without the barriers XLA would join each transposition to the product again.
    apart = jax.lax.optimization_barrier
    if y_MF.shape[1] < x_MD.shape[1]:
        slope_DF = apart(apart(y_MF.T) @ x_MD).T
    else:
        slope_DF = apart(x_MD.T) @ y_MF
    return y_MF @ w_DF.T, slope_DF


_multiply.defvjp(lambda x_MD, w_DF: (x_MD @ w_DF, (x_MD, w_DF)), _multiply_backward)


def computed_once(function: Callable[[Any], Any], x: Any, integers: jax.Array) -> Any:
    """function(x), computed once although many later passes read it.

    XLA on CPU removes optimization barriers before it fuses, and computes an elementwise function
    again inside every pass that reads it. It fuses nothing out of a conditional, even one with two
    identical branches.

    Args:
      function: of x, not differentiated.
      x: its argument.
      integers: any array that the compiler does not know; the conditional depends on it.
    """
    if not is_on():
        return function(x)
    return jax.lax.cond(integers.min() >= 0, function, function, x)
