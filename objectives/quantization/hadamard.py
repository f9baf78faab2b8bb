"""Hadamard matrices, and the random rotations that are made of them.

n  order of a matrix, K order of its part that is not Sylvester's
"""

import jax
import jax.numpy as jnp
import numpy as np


def hadamard(n: int) -> np.ndarray:
    """A matrix of +1 and -1 with H H^T = n I; float32 [n, n].

    The Kronecker product of a power of two (Sylvester's construction) and, where n is none, one of
    Paley's matrices of the smallest order K that n has one of, with a prime q:

      Paley I    K = q + 1,      q = 3 mod 4
      Paley II   K = 2 (q + 1),  q = 1 mod 4

    So 576 = 16 * 36 and 1536 = 128 * 12. Prime powers q are left out, and with them 52 and 100
    (104 and 200 exist).

    Raises:
      ValueError: an order without such a factorisation, although a matrix may be known.
    """
    order = n
    while order > 2 and order % 2 == 0:
        order //= 2
    # The smallest K = odd part * power of two; 1 and 2 are Sylvester's.
    while 2 < order <= n and (paley := _paley(order)) is None:
        order *= 2
    if n < 1 or order > n:
        raise ValueError(
            f"no Hadamard matrix of order {n} as a power of two times Paley's: it must be 1, 2 or "
            "2^k times q + 1 (prime q = 3 mod 4) or 2 (q + 1) (prime q = 1 mod 4)"
        )
    h_KK = np.array([[1]], np.float32) if order <= 2 else paley
    while len(h_KK) < n:
        h_KK = np.block([[h_KK, h_KK], [h_KK, -h_KK]])
    return h_KK


def randomized_hadamard(n: int, key: jax.Array) -> jax.Array:
    """A random rotation R = D H / sqrt(n), float32 [n, n]: D is diagonal, of random signs.

    In x R the signs come before the mixing, so that no fixed x, such as one of equal channels, is
    gathered in one channel but by chance. QuaRot (arXiv 2404.00456) and RSQ (arXiv 2503.01820)
    rotate a model by such matrices.

    Raises:
      ValueError: as `hadamard`.
    """
    h_NN = jnp.asarray(hadamard(n))
    sign_N1 = jax.random.rademacher(key, (n, 1), jnp.float32)
    return sign_N1 * h_NN / np.sqrt(np.float32(n))


def _paley(order: int) -> np.ndarray | None:
    """Paley's matrix of this order, of the first construction if there is one, else the second."""
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        return _bordered(q, -1) + np.eye(order, dtype=np.float32)
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        c = _bordered(q, 1)
        one = np.eye(len(c), dtype=np.float32)
        return np.block([[c + one, c - one], [c - one, -c - one]])
    return None


def _bordered(q: int, sign: int) -> np.ndarray:
    """The conference matrix of q: C C^T = q I, C^T = sign C, zeros on the diagonal; [q + 1, q + 1].

    Inside its border is chi(i - j), chi(a) being 1 for squares modulo q, -1 for others, 0 for 0.
    """
    chi_Q = np.full(q, -1.0, np.float32)
    chi_Q[np.arange(q) ** 2 % q] = 1
    chi_Q[0] = 0
    c = np.zeros((q + 1, q + 1), np.float32)
    c[1:, 1:] = chi_Q[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    c[0, 1:] = 1
    c[1:, 0] = sign
    return c


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))
