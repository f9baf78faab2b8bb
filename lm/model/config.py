"""The shape of a model, checked when it is made."""

import dataclasses
import difflib

from lm.errors import InputError

CHOICES = {
    "activation": ("gelu", "relu2", "swiglu"),
    "norm": ("rmsnorm", "layernorm"),
    "embedding": ("learned",),
    "attention": ("auto", "einsum", "xla", "cudnn"),
    "remat": ("none", "full", "dots"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises InputError, with the nearest valid name, unless `value` is one of `choices`."""
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InputError(f"{key}={value!r} is not one of: {', '.join(choices)}{hint}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The `model` section of a config and the vocabulary of its tokenizer.

    The keys are explained, and have their defaults, in `configs/base.py`. The arithmetic of heads
    and widths is checked here; InputError names the key.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    activation: str
    norm: str
    embedding: str
    tied_head: bool
    rope_base: float
    qk_norm: bool
    logit_softcap: float
    attention: str
    remat: str
    unroll: int
    dtype: str
    param_dtype: str

    def __post_init__(self):
        for key, choices in CHOICES.items():
            check_choice(f"model.{key}", getattr(self, key), choices)
        for key in ("layers", "width", "heads", "kv_heads", "mlp_width", "unroll"):
            if getattr(self, key) < 1:
                raise InputError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.vocab_size < 2:
            raise InputError(f"a vocabulary of {self.vocab_size} is too small: at least 2")
        if self.width % self.heads:
            raise InputError(
                f"model.heads={self.heads} does not divide model.width={self.width}; "
                f"valid: {', '.join(map(str, _divisors(self.width)))}"
            )
        if self.head_width % 2:
            raise InputError(
                f"model.width / model.heads = {self.head_width} must be even: rotary positions "
                "turn pairs of channels"
            )
        if self.heads % self.kv_heads:
            raise InputError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}; "
                f"valid: {', '.join(map(str, _divisors(self.heads)))}"
            )
        if self.layers % self.unroll:
            raise InputError(
                f"model.unroll={self.unroll} does not divide model.layers={self.layers}"
            )
        if self.logit_softcap < 0:
            raise InputError(f"model.logit_softcap={self.logit_softcap} must be 0 (off) or above")
        if self.rope_base <= 0:
            raise InputError(f"model.rope_base={self.rope_base} must be above 0")

    @property
    def head_width(self) -> int:
        """Channels of one attention head, H."""
        return self.width // self.heads


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
