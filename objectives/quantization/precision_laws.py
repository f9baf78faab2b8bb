"""What low precision costs in loss: the laws of arXiv 2505.14302 (QAT) and 2411.04330 (precision).

Plain Python floats. Tokens, parameters and bits are counts, losses are nats per token.
"""

import math
from typing import NamedTuple


class ChenLaw(NamedTuple):
    """Coefficients of `chen_qat_law` in one setting, arXiv 2505.14302, table of fitted values."""

    factor: float
    parameters_exponent: float
    tokens_exponent: float
    group_exponent: float


# WxAy: x-bit weights, y-bit activations; fc2_8bit keeps the input of the down projection at 8 bits.
CHEN_LAWS = {
    "W4A4": ChenLaw(0.1582, 0.2186, 0.0745, 0.7779),
    "W4A16": ChenLaw(0.2522, 0.3589, 0.1610, 0.3533),
    "W16A4": ChenLaw(0.1004, 0.1816, 0.0331, 0.9812),
    "W4A4_fc2_8bit": ChenLaw(0.3519, 0.2637, 0.0964, 0.3407),
    "W16A4_fc2_8bit": ChenLaw(0.1273, 0.2347, 0.0827, 0.4491),
}


def chen_qat_law(tokens: float, parameters: float, group_size: float, setting: str) -> float:
    """Loss that quantization adds to a model trained with it from scratch (arXiv 2505.14302).

      delta = k D^gD (log2 G)^gG N^-gN

    D tokens, N parameters, G weights in a group (1 adds nothing). Fitted on models of 74 to 595
    million parameters and 10 to 100 billion tokens. The law's full-precision part is left out: its
    exponents 0.3022 are confirmed, its other three constants are not.

    Args:
      tokens: D.
      parameters: N.
      group_size: G, at least 1.
      setting: a key of `CHEN_LAWS`.

    Raises:
      ValueError: another setting, or an argument out of range.
    """
    if setting not in CHEN_LAWS:
        raise ValueError(f"setting must be one of {tuple(CHEN_LAWS)}; got {setting!r}")
    if not (tokens > 0 and parameters > 0 and group_size >= 1):
        raise ValueError("tokens and parameters must be positive and group_size at least 1")
    c = CHEN_LAWS[setting]
    scale = c.factor * tokens**c.tokens_exponent * parameters**-c.parameters_exponent
    return scale * math.log2(group_size) ** c.group_exponent


class KumarLaw(NamedTuple):
    """Coefficients of `kumar_precision_law`, arXiv 2411.04330; None is not known for certain."""

    parameters_factor: float = 4299.0  # A
    exponent: float = 0.4965  # alpha = beta
    weight_gamma: float = 2.6745
    post_tokens_exponent: float = 0.5068  # gD
    post_parameters_exponent: float = 0.3439  # gN
    cache_gamma: float | None = None
    activation_gamma: float | None = None
    tokens_factor: float | None = None  # B
    irreducible: float | None = None  # E
    post_factor: float | None = None  # C_T
    post_gamma: float | None = None


KUMAR_CONFIRMED = KumarLaw()
# The rest from memory, not seen in a source (the first is published as about 0.96).
KUMAR_UNCONFIRMED = KumarLaw(
    cache_gamma=0.9578,
    activation_gamma=2.2102,
    tokens_factor=1.806e4,
    irreducible=2.7648,
    post_factor=0.0598,
    post_gamma=0.5907,
)


def kumar_effective_parameters(
    parameters: float,
    weight_bits: float = math.inf,
    activation_bits: float = math.inf,
    cache_bits: float = math.inf,
    law: KumarLaw = KUMAR_CONFIRMED,
) -> float:
    """N_eff = N prod_x (1 - exp(-P_x / gamma_x)) over weights, activations and the KV cache.

    A width of infinity leaves its factor out.

    Raises:
      ValueError: a finite width whose gamma `law` does not have.
    """
    parts = (
        ("weight_gamma", weight_bits),
        ("activation_gamma", activation_bits),
        ("cache_gamma", cache_bits),
    )
    for name, bits in parts:
        if math.isfinite(bits):
            (gamma,) = _known(law, name)
            parameters *= -math.expm1(-bits / gamma)
    return parameters


def kumar_precision_law(
    tokens: float,
    parameters: float,
    weight_bits: float = math.inf,
    activation_bits: float = math.inf,
    cache_bits: float = math.inf,
    post_bits: float | None = None,
    law: KumarLaw = KUMAR_CONFIRMED,
) -> dict[str, float]:
    """Terms of the loss of a model trained in low precision (arXiv 2411.04330), by name.

      parameters     A N_eff^-alpha                              confirmed (weights only)
      tokens         B D^-alpha                                  B is unconfirmed
      irreducible    E                                           unconfirmed
      post_training  C_T D^gD N^-gN exp(-P_post / gamma_post)    C_T and gamma_post are unconfirmed

    Terms that lack a coefficient are left out: with the default only the first is there, and with
    `law=KUMAR_UNCONFIRMED` they add up to a loss. The authors say that the constants do not carry
    over to other models. The unified form, with its prod_x [1 - exp(-C_x (P_x - P_post))], is not
    confirmed either and is left out.

    Args:
      tokens: D.
      parameters: N, without embeddings in the paper.
      weight_bits: P_w in training.
      activation_bits: P_a in training.
      cache_bits: P_kv in training.
      post_bits: P_post if the model is quantized after training, else None.
      law: coefficients.

    Raises:
      ValueError: a width, or post_bits, whose coefficients `law` does not have.
    """
    effective = kumar_effective_parameters(
        parameters, weight_bits, activation_bits, cache_bits, law
    )
    terms = {"parameters": law.parameters_factor * effective**-law.exponent}
    if law.tokens_factor is not None:
        terms["tokens"] = law.tokens_factor * tokens**-law.exponent
    if law.irreducible is not None:
        terms["irreducible"] = law.irreducible
    if post_bits is not None:
        factor, gamma = _known(law, "post_factor", "post_gamma")
        growth = tokens**law.post_tokens_exponent * parameters**-law.post_parameters_exponent
        terms["post_training"] = factor * growth * math.exp(-post_bits / gamma)
    return terms


def _known(law: KumarLaw, *names: str) -> list[float]:
    missing = [name for name in names if getattr(law, name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not confirmed; give a law that has them")
    return [getattr(law, name) for name in names]
