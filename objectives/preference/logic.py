"""What the losses of pairs say, each as a statement and the odds of it.

p_w and p_l are the probabilities of the chosen and of the rejected answer, r_w and r_l those of the
reference, P_w and P_l the geometric means over their tokens. "w" is the event that the model gives
the chosen answer, "w'" that the reference does.

Most losses here are -log of a share of a weighted count, a / (a + b), in which a weighs what
agrees with the statement and b what contradicts it: -log sigmoid(log a - log b). So a loss is
known by its a and b, and its margin is log a - log b. What the statements are about, and how a loss
and a statement can be turned into each other, is the subject of "Understanding the Logic of Direct
Preference Alignment through Logic" (arXiv 2412.17696). The forms below are derived here, from the
losses as they are in this folder, and are not copied from the paper; it may write the same loss by
another statement.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """Logarithms of the probabilities of two answers, and their numbers of tokens.

    Attributes:
      w, l: log p_w and log p_l.
      reference_w, reference_l: log r_w and log r_l.
      tokens_w, tokens_l: numbers of tokens.
    """

    w: float
    l: float  # noqa: E741 - as in all formulas
    reference_w: float
    reference_l: float
    tokens_w: int
    tokens_l: int


class Form(NamedTuple):
    """One loss of `objectives.preference.PREFERENCE` in its symbolic form.

    Attributes:
      statement: what is to hold.
      agrees: a, the weight of what agrees with it.
      contradicts: b, the weight of what contradicts it.
      loss: of a and b.
      odds: (pair, beta, gamma) -> (log a, log b); gamma is that of SimPO, delta of BCO.
    """

    statement: str
    agrees: str
    contradicts: str
    loss: str
    odds: Callable[[Pair, float, float], tuple[float, float]]

    @property
    def margin(self) -> str:
        """log a - log b, in words."""
        return f"log({self.agrees}) - log({self.contradicts})"


_SHARE = "-log a/(a+b)"


def _dpo(x: Pair, beta: float, _: float) -> tuple[float, float]:
    return beta * (x.w + x.reference_l), beta * (x.l + x.reference_w)


def _cpo(x: Pair, beta: float, _: float) -> tuple[float, float]:
    return beta * x.w, beta * x.l


def _simpo(x: Pair, beta: float, gamma: float) -> tuple[float, float]:
    return beta * x.w / x.tokens_w, beta * x.l / x.tokens_l + gamma


def _orpo(x: Pair, beta: float, _: float) -> tuple[float, float]:
    w, other = x.w / x.tokens_w, x.l / x.tokens_l
    return w + np.log1p(-np.exp(other)), other + np.log1p(-np.exp(w))


def _wanted(x: Pair, beta: float, delta: float) -> tuple[float, float]:
    return beta * x.w, beta * x.reference_w + delta


def _unwanted(x: Pair, beta: float, delta: float) -> tuple[float, float]:
    return beta * x.reference_l + delta, beta * x.l


# Name of the objective, with a remark -> its form.
FORMS = {
    "cpo": Form("l -> w", "p_w^beta", "p_l^beta", f"{_SHARE}, and -log p_w by token", _cpo),
    "dpo": Form("(l and w') -> (w and l')", "(p_w r_l)^beta", "(p_l r_w)^beta", _SHARE, _dpo),
    "ipo": Form(
        "(l and w') -> (w and l')",
        "p_w r_l",
        "p_l r_w",
        "(log a/b - 1/(2 beta))^2",
        lambda x, beta, _: _dpo(x, 1.0, 0.0),
    ),
    "simpo": Form("l -> w, by e^gamma", "P_w^beta", "P_l^beta e^gamma", _SHARE, _simpo),
    "orpo": Form(
        "l -> w, of exactly one of them",
        "P_w (1 - P_l)",
        "P_l (1 - P_w)",
        f"beta ({_SHARE}), and -log p_w by token",
        _orpo,
    ),
    "bco, wanted": Form("w' -> w", "p_w^beta", "r_w^beta e^delta", _SHARE, _wanted),
    "bco, unwanted": Form("l -> l'", "r_l^beta e^delta", "p_l^beta", _SHARE, _unwanted),
    "kto, wanted": Form("w' -> w", "p_w^beta", "r_w^beta e^(beta z0)", "b/(a+b)", _wanted),
    "kto, unwanted": Form("l -> l'", "r_l^beta e^(beta z0)", "p_l^beta", "b/(a+b)", _unwanted),
    "npo": Form("l -> l'", "r_l^beta", "p_l^beta", f"2/beta ({_SHARE})", _unwanted),
    "sim_npo": Form(
        "not l",
        "1",
        "P_l^beta e^(beta delta)",
        f"2/beta ({_SHARE})",
        lambda x, beta, delta: (0.0, beta * x.l / x.tokens_l + beta * delta),
    ),
}
