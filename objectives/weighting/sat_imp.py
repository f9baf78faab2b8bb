"""Unlearning by weighted gradient ascent: SatImp and its relatives, p^b1 (1 - p)^b2."""

import jax
import jax.numpy as jnp

from objectives.weighting.base import Weighting, check_number, multiply, stateless


def sat_imp(beta1: float = 5.0, beta2: float = 1.0, ascend: bool = True) -> Weighting:
    """w = -d * p^beta1 * (1 - p)^beta2, p = exp(-l) detached: forgets what it is trained on.

    Saturation p^beta1 spares what is forgotten already, importance (1 - p)^beta2 what is known too
    well. SatImp (arXiv 2505.11953); its loss is the mean over forget tokens, normalisation `all`,
    and the only one allowed with negative weights. beta1 = beta2 = 0 is gradient ascent, minus
    cross-entropy. Two defaults of beta2 exist: 1 in open-unlearning, 0.1 in the authors' README.
    Their `simsat_ga` ignores its exponent; `sim_sat` here does not. The retain term is not here.

    Args:
      beta1: exponent of the saturation, at least 0.
      beta2: exponent of the importance, at least 0.
      ascend: whether weights are negative; False gives the same weights for descent.

    Raises:
      ValueError: a negative exponent.
    """
    check_number("beta1", beta1, least=0)
    check_number("beta2", beta2, least=0)
    return _power_family(beta1, beta2, ascend)


def sim_sat(beta: float = 5.0, ascend: bool = True) -> Weighting:
    """SimSat: w = -d * p^beta. `sat_imp` with its saturation alone (arXiv 2505.11953).

    Args:
      beta: exponent of p, at least 0.
      ascend: whether weights are negative; False gives the same weights for descent.
    """
    check_number("beta", beta, least=0)
    return _power_family(beta, 0.0, ascend)


def sim_imp(beta: float = 5.0, ascend: bool = True) -> Weighting:
    """SimImp: w = -d * (1 - p)^beta. `sat_imp` with its importance alone (arXiv 2505.11953).

    Args:
      beta: exponent of 1 - p, at least 0.
      ascend: whether weights are negative; False gives the same weights for descent.
    """
    check_number("beta", beta, least=0)
    return _power_family(0.0, beta, ascend)


def wga(beta: float = 1.0, ascend: bool = True) -> Weighting:
    """Weighted gradient ascent: w = -d * p^beta, as SimSat but with its own default exponent.

    Args:
      beta: exponent of p, at least 0.
      ascend: whether weights are negative; False gives the same weights for descent.
    """
    check_number("beta", beta, least=0)
    return _power_family(beta, 0.0, ascend)


def _power_family(beta1: float, beta2: float, ascend: bool) -> Weighting:
    def weigh(statistics, batch, references, state, step):
        nll_BT = jax.lax.stop_gradient(statistics.nll)
        multiplier_BT = jnp.exp(-beta1 * nll_BT) * jnp.power(-jnp.expm1(-nll_BT), beta2)
        return multiply(batch, -multiplier_BT if ascend else multiplier_BT), state, {}

    return Weighting(
        stateless,
        weigh,
        uses_statistics=True,
        normaliser="all" if ascend else "kept",
        signed=ascend,
    )
