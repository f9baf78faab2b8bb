"""Texts that a model draws, in a file that is a corpus: JSON lines with `text`.

Data-free quantization-aware training (LLM-QAT, arXiv 2305.17888) trains a model on its own samples
where its training text is not at hand. The file is the cache: it is written once, and a command
that was killed goes on where it stopped.

B rows, P tokens of a prompt, S tokens that are drawn.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import strict_json
from lm.compression.phases import Quantized
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError
from lm.model.interface import Model
from lm.model.trained import Trained
from lm.parallel.mesh import to_host
from lm.rollouts.prompts import Prompts
from lm.rollouts.sampling import make_complete, row_keys
from objectives.losses import Loss

# Texts that are drawn at once. Text i depends on the seed and on i, which this is a part of.
ROWS = 16


def make_draw_texts(
    model: Model,
    loss: Loss,
    quantized: Quantized | None,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Callable[[Trained, int, int], Iterator[str]]:
    """(trained, seed, number of the first text) -> texts without end: the prompt and what follows.

    A text ends before the token that ends it. Its tokens depend on the parameters, the seed and its
    number.

    Args:
      model, loss, quantized, temperature, top_k, top_p: see `sampling.make_complete`.
      tokenizer: of the text.
      prompt: what every text begins with; "" is the beginning of a document.
      tokens: S, of a continuation at most.
    """
    ids, _ = tokenizer.encode(prompt)
    prompt_P = np.concatenate([[tokenizer.beginning_of_text], ids]).astype(np.int32)
    complete = make_complete(
        model,
        loss,
        quantized,
        tokens=tokens,
        temperature=temperature,
        ends=(tokenizer.end_of_text,),
        top_k=top_k,
        top_p=top_p,
    )

    @jax.jit
    def draw(trained, seed, number):
        zeros_B = jnp.zeros(ROWS, jnp.int32)
        prompts_BP = jnp.broadcast_to(jnp.asarray(prompt_P), (ROWS, len(prompt_P)))
        prompts = Prompts(prompts_BP, jnp.ones_like(prompts_BP), zeros_B == 0, zeros_B, zeros_B)
        return complete(trained, prompts, row_keys(seed, number, ROWS))

    def texts(trained, seed, first):
        while True:
            tokens_BS = to_host(draw(trained, seed, first // ROWS).tokens_BS)
            for tokens_S in tokens_BS[first % ROWS :]:
                ended = np.flatnonzero(tokens_S == tokenizer.end_of_text)
                yield prompt + tokenizer.decode(tokens_S[: ended[0] if len(ended) else None])
                first += 1

    return texts


def written(path: Path, settings: Mapping[str, Any]) -> int:
    """How many texts the file holds that were drawn with these settings; 0 where there is none.

    A last line that was cut off is taken away, but not from a file without a whole line, which may
    be of something else.

    Raises:
      InputError: a file of something else, or drawn with other settings.
    """
    if not path.exists():
        return 0
    count = end = 0
    with path.open("rb") as file:
        for line in file:
            whole = line.endswith(b"\n")
            if count and not whole:
                break
            if not whole or _settings(line) != (count, dict(settings)):
                raise InputError(
                    f"{path}:{count + 1} was not drawn by this command with these options; valid: "
                    "a new file, or the options of the one that began it"
                )
            count, end = count + 1, end + len(line)
    with path.open("r+b") as file:
        file.truncate(end)
    return count


def line_of(text: str, number: int, settings: Mapping[str, Any]) -> str:
    """The line of a text: `text`, `number` and the settings it was drawn with."""
    return strict_json.dumps({"text": text, "number": number, "drawn": dict(settings)}) + "\n"


def _settings(line: bytes) -> tuple[Any, Any]:
    try:
        found = json.loads(line)
        return found["number"], found["drawn"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, None
