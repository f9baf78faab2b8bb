"""The shape of a model, checked when it is made."""

import dataclasses
import difflib
import re

from lm.errors import InputError
from lm.model import codes
from lm.model.rotary import Rope

CHOICES = {
    "activation": ("gelu", "gelu_exact", "relu2", "swiglu", "geglu"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("before", "after", "both"),
    "qk_norm_scope": ("head", "all"),
    "attention_bias": ("none", "qkv", "all"),
    "positions": ("rotary", "learned"),
    "rope_scaling": ("none", "linear", "llama3"),
    "embedding": (
        "learned",
        "binary",
        "affine",
        "random_codes",
        "gaussian",
        "projected",
        "learned_low_rank",
    ),
    "code_values": tuple(codes.VALUES),
    "code_layout": ("tile", "interleave"),
    "code_signs": ("none", "alternate", "random"),
    "attention": ("auto", "einsum", "xla", "cudnn", "splash"),
    "remat": ("none", "full", "dots"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}

# Layers up to which model.unroll=0 leaves no loop. A loop stacks what each layer keeps for the
# backward pass; without one, few layers run faster and compile as fast.
UNROLLED = 8

# Interfaces that train a vector for each token; only these can be the head as they are.
TABLES = ("learned", "learned_low_rank")


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
    embedding_rank: int
    code_bits: int
    code_values: str
    code_layout: str
    code_scale: float
    code_signs: str
    code_seed: int
    accept_aliasing: bool
    tied_head: bool
    code_head: bool
    rope_base: float
    qk_norm: bool
    logit_softcap: float
    attention: str
    remat: str
    unroll: int
    dtype: str
    param_dtype: str
    adapter_rank: int = 0
    adapter_alpha: float = 16.0
    adapter_dropout: float = 0.0
    adapter_matrices: str = ""
    head_width: int = 0
    attention_bias: str = "none"
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    mlp_bias: bool = False
    qk_norm_scope: str = "head"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    norm_placement: str = "before"
    norm_bias: bool = False
    parallel_block: bool = False
    embedding_scale: float = 0.0
    positions: str = "rotary"
    max_positions: int = 1024
    rope_share: float = 1.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_length: int = 8192
    layer_pattern: str = "G"
    window: int = 0
    local_rope_base: float = 0.0
    plain_autodiff: bool = False

    def __post_init__(self):
        for key, choices in CHOICES.items():
            check_choice(f"model.{key}", getattr(self, key), choices)
        for key in (
            "layers",
            "width",
            "heads",
            "kv_heads",
            "mlp_width",
            "embedding_rank",
        ):
            if getattr(self, key) < 1:
                raise InputError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.vocab_size < 2:
            raise InputError(f"a vocabulary of {self.vocab_size} is too small: at least 2")
        self._settle_head_width()
        if self.heads % self.kv_heads:
            raise InputError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}; "
                f"valid: {', '.join(map(str, _divisors(self.heads)))}"
            )
        if self.unroll < 0 or self.layers % self.unrolled:
            raise InputError(
                f"model.unroll={self.unroll} must be 0 (all of up to {UNROLLED} layers) or divide "
                f"model.layers={self.layers}"
            )
        if self.logit_softcap < 0:
            raise InputError(f"model.logit_softcap={self.logit_softcap} must be 0 (off) or above")
        if self.plain_autodiff and self.attention in ("cudnn", "splash"):
            raise InputError(
                f"model.plain_autodiff=True: model.attention={self.attention} has a gradient of "
                "its own; valid: auto, einsum, xla"
            )
        self._check_positions()
        self._check_adapters()
        self._check_head()
        self._check_codes()

    def _settle_head_width(self):
        """Replaces a head width of 0 by width / heads."""
        if self.head_width < 0:
            raise InputError(
                f"model.head_width={self.head_width} must be 0 (width / heads) or above"
            )
        if not self.head_width:
            if self.width % self.heads:
                raise InputError(
                    f"model.heads={self.heads} does not divide model.width={self.width}; "
                    f"valid: {', '.join(map(str, _divisors(self.width)))}, or a model.head_width"
                )
            object.__setattr__(self, "head_width", self.width // self.heads)

    def _check_positions(self):
        if self.positions == "rotary" and (self.rotary_width % 2 or not self.rotary_width):
            raise InputError(
                f"model.head_width={self.head_width} times model.rope_share={self.rope_share} = "
                f"{self.rotary_width} must be even, and above 0: rotary positions turn pairs of "
                "channels"
            )
        if not 0 < self.rope_share <= 1:
            raise InputError(f"model.rope_share={self.rope_share} must be above 0 and at most 1")
        for key in ("rope_base", "rope_factor", "norm_epsilon", "rope_low_frequency"):
            if getattr(self, key) <= 0:
                raise InputError(f"model.{key}={getattr(self, key)} must be above 0")
        for key in ("attention_softcap", "attention_scale", "embedding_scale", "local_rope_base"):
            if getattr(self, key) < 0:
                raise InputError(f"model.{key}={getattr(self, key)} must be 0 (off) or above")
        for key in ("max_positions", "rope_original_length"):
            if getattr(self, key) < 1:
                raise InputError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.rope_high_frequency <= self.rope_low_frequency:
            raise InputError(
                f"model.rope_high_frequency={self.rope_high_frequency} must be above "
                f"model.rope_low_frequency={self.rope_low_frequency}"
            )
        if not self.layer_pattern or set(self.layer_pattern) - set("GLN"):
            raise InputError(
                f"model.layer_pattern={self.layer_pattern!r} must be made of the letters G (sees "
                "all), L (a window) and N (all, without rotary positions)"
            )
        if "L" in self.layer_pattern and self.window < 1:
            raise InputError(
                f"model.window={self.window} must be at least 1 with model.layer_pattern="
                f"{self.layer_pattern!r}: L layers see that many tokens"
            )
        if self.attention_softcap and self.attention not in ("auto", "einsum"):
            raise InputError(
                f"model.attention={self.attention} has no model.attention_softcap; valid: auto, "
                "einsum"
            )
        if self.embedding_scale and self.embedding != "learned":
            raise InputError(
                f"model.embedding_scale={self.embedding_scale} is of model.embedding=learned; "
                f"model.embedding={self.embedding} needs 0"
            )

    def _check_adapters(self):
        if self.adapter_rank < 0:
            raise InputError(f"model.adapter_rank={self.adapter_rank} must be 0 (off) or above")
        if self.adapter_alpha <= 0:
            raise InputError(f"model.adapter_alpha={self.adapter_alpha} must be above 0")
        if not 0 <= self.adapter_dropout < 1:
            raise InputError(
                f"model.adapter_dropout={self.adapter_dropout} must be at least 0 and below 1"
            )
        try:
            re.compile(self.adapter_matrices)
        except re.error as error:
            raise InputError(
                f"model.adapter_matrices={self.adapter_matrices!r} is no regular expression: "
                f"{error}"
            ) from None

    def _check_head(self):
        if self.tied_head and self.code_head:
            raise InputError("model.tied_head and model.code_head are two heads: set one of them")
        if self.tied_head and self.embedding not in TABLES:
            raise InputError(
                f"model.tied_head needs a table and model.embedding={self.embedding!r} has none; "
                "set model.tied_head=False for a head of its own, model.code_head=True for logits "
                f"from the codes, or model.embedding to one of: {', '.join(TABLES)}"
            )
        if self.code_head and self.embedding in TABLES:
            raise InputError(
                f"model.code_head needs codes and model.embedding={self.embedding!r} is a table; "
                "use model.tied_head=True"
            )

    def _check_codes(self):
        if self.code_scale <= 0:
            raise InputError(f"model.code_scale={self.code_scale} must be above 0")
        if self.code_seed < 0:
            raise InputError(f"model.code_seed={self.code_seed} must be 0 or above")
        if self.embedding not in (*codes.CODES, "projected"):
            return
        # Ids are int32; random codes are as long as one likes.
        least = codes.minimal_bits(self.vocab_size)
        most = self.width if self.embedding == "random_codes" else 31
        if self.embedding != "projected":
            most = min(most, self.width)
        if least > most:
            raise InputError(
                f"model.width={self.width} is too small for the {least} bits of a vocabulary of "
                f"{self.vocab_size}"
            )
        if not least <= self.num_bits <= most:
            raise InputError(
                f"model.code_bits={self.code_bits} must be 0 or {least} to {most} for "
                f"model.embedding={self.embedding!r} and a vocabulary of {self.vocab_size}"
            )
        if (pair := self.aliased_ids()) and not self.accept_aliasing:
            raise InputError(
                f"with model.norm='layernorm' the tokens {pair[0]} and {pair[1]}, whose codes are "
                "all zeros and all ones, differ by a constant over channels that no layer sees, "
                "and give the same logits everywhere. Set model.norm=rmsnorm, "
                "model.code_signs=alternate (at least two copies of the code in model.width), "
                f"model.embedding=projected, for binary codes model.code_bits={self.num_bits + 1}, "
                "or leave one of the two codes unused by a smaller vocabulary; or accept it with "
                "model.accept_aliasing=True"
            )

    def aliased_ids(self) -> tuple[int, int] | None:
        """Two ids that this model cannot tell apart, or None.

        Lifted codes that differ by a constant over channels are the same to every mean-subtracting
        LayerNorm, the last one included, and rotary positions add nothing to the residual stream.
        Every copy of every bit must then differ in the same way: codes are all zeros and ones, and
        all copies have one sign (bit 0 is in every copy). That holds for any values and scale, and
        for a width that is no multiple of the bits.
        """
        if self.norm != "layernorm" or self.embedding not in codes.CODES:
            return None
        signs = codes.sign_pattern(self.code_signs, self.code_copies, self.code_seed)
        if signs is not None and len(set(signs.tolist())) > 1:
            return None
        code = codes.CODES[self.embedding](self.num_bits, self.code_seed)
        zeros, ones = codes.uniform_ids(code, self.num_bits, self.vocab_size)
        return None if zeros is None or ones is None else (zeros, ones)

    @property
    def num_bits(self) -> int:
        """Bits of a token code, K."""
        return self.code_bits or codes.minimal_bits(self.vocab_size)

    @property
    def code_copies(self) -> int:
        """Copies of a code in the width, the last of which may be cut."""
        return -(-self.width // self.num_bits)

    @property
    def own_head(self) -> bool:
        """Whether the output head is a matrix of its own."""
        return not (self.tied_head or self.code_head)

    @property
    def unrolled(self) -> int:
        """Layers in one turn of the loop over layers."""
        # Recomputing in the backward pass needs the loop: without one, XLA finds that it has the
        # values already.
        few = self.layers <= UNROLLED and self.remat == "none"
        return self.unroll or (self.layers if few else 1)

    @property
    def unrolled_decoding(self) -> int:
        """Layers in one turn of the loop over layers in decoding, U."""
        return self.unroll or (self.layers if self.layers <= UNROLLED else 1)

    @property
    def rotary_width(self) -> int:
        """Channels of a head that rotary positions turn, R."""
        return int(self.head_width * self.rope_share)

    def rope(self, local: bool = False) -> Rope:
        """The frequencies of the rotary positions, of all layers or of those with a window.

        With a base of their own (model.local_rope_base), the latter have no scaling.
        """
        if local and self.local_rope_base:
            return Rope(self.rotary_width, self.local_rope_base)
        return Rope(
            self.rotary_width,
            self.rope_base,
            self.rope_scaling,
            self.rope_factor,
            self.rope_low_frequency,
            self.rope_high_frequency,
            self.rope_original_length,
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
