r"""Loss of a model on two held-out English texts, in nats a token.

python benchmarks/held_out.py --model=M [--texts=topics,FILE.txt]

M is whatever launch.evaluate takes. Of each text the last 16,384 tokens are read, in 32 rows of
512, of which tokens 2 to 512 are targets; no token marks a beginning or an end. "topics" is the
language reference that comes with Python: the values of pydoc_data.topics in the order of their
names, with an empty line between two of them. A file is read as it is.
"""

from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
from absl import flags

from launch import command, workdir
from lm import strict_json
from lm.errors import InputError
from lm.evaluation import perplexity

_TEXTS = flags.DEFINE_list("texts", ["topics"], "'topics', or text files.")

ROWS, LENGTH = 32, 512


def main() -> None:
    """Prints one JSON object: the loss by text."""
    command.use_compilation_cache()
    loaded = workdir.load_chosen()
    texts = {name: tokens(loaded.tokenizer, read(name)) for name in _TEXTS.value}
    with jax.set_mesh(loaded.run.mesh):
        trained, quantized = loaded.run.usable(loaded.state)
        step = loaded.run.eval_step()
        scores = {
            name: perplexity.evaluate(
                step, trained, rows(ids), loaded.run.mesh, quantized=quantized
            )
            for name, ids in texts.items()
        }
    print(strict_json.dumps({name: round(score.loss, 5) for name, score in scores.items()}))


def read(name: str) -> str:
    """The text of that name."""
    if name == "topics":
        return "\n\n".join(topics[key] for key in sorted(topics))
    if not Path(name).is_file():
        raise InputError(f"--texts={name}: no such file; valid: 'topics', or text files")
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--texts={name}: not UTF-8 text: {error}") from None


def tokens(tokenizer, text: str) -> np.ndarray:
    """The last tokens of a text, [rows, length]."""
    ids = np.asarray(tokenizer.encode(text)[0])[-ROWS * LENGTH :]
    if len(ids) < ROWS * LENGTH:
        raise InputError(f"a text of {len(ids):,} tokens; valid: {ROWS * LENGTH:,} or more")
    return ids.reshape(ROWS, LENGTH).astype(np.int32)


def rows(ids: np.ndarray, size: int = 4):
    """Batches of the rows."""
    for start in range(0, ROWS, size):
        part = ids[start : start + size, :-1]
        ones = np.ones(part.shape, np.int32)
        yield {
            "tokens": part,
            "targets": ids[start : start + size, 1:],
            "positions": np.broadcast_to(np.arange(part.shape[1], dtype=np.int32), part.shape),
            "segment_ids": ones,
            "weights": ones.astype(np.float32),
            "num_bytes": ones,
        }


if __name__ == "__main__":
    command.run(main)
