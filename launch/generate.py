"""Samples text from a model and shows it as it comes, talks with it, or writes a corpus of samples.

python -m launch.generate --model=runs/quickstart --prompt="def "
python -m launch.generate --model=model.gguf --chat
python -m launch.generate --model=model.gguf --count=1000 --samples=samples.jsonl --temperature=1
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, workdir
from lm.errors import InputError, writing

_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Tokens to add at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0 is off.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this total; 1 is off.")
_CHAT = flags.DEFINE_bool(
    "chat", False, "Answer --prompt, or else every line of standard input, by the chat template."
)
_COUNT = flags.DEFINE_integer("count", 1, "Texts to draw, into the file --samples.")
_SAMPLES = flags.DEFINE_string(
    "samples", None, "File of JSON lines with `text`; a command that was killed goes on with it."
)
_SYSTEM = flags.DEFINE_string("system", "", "What a chat begins with, as the system's message.")


def main() -> None:
    """Prints the prompt and its continuation, token by token, up to the end of text or turn."""
    if _TOKENS.value < 1:
        raise InputError(f"--tokens={_TOKENS.value} must be at least 1")
    if _TEMPERATURE.value < 0:
        raise InputError(f"--temperature={_TEMPERATURE.value} must be 0 or above")
    if _TOP_K.value < 0:
        raise InputError(f"--top_k={_TOP_K.value} must be 0 or above")
    if not 0 < _TOP_P.value <= 1:
        raise InputError(f"--top_p={_TOP_P.value} must be above 0 and at most 1")
    if _COUNT.value < 1:
        raise InputError(f"--count={_COUNT.value} must be at least 1")
    if (_COUNT.value > 1) != (_SAMPLES.value is not None):
        raise InputError("--count above 1 and --samples=FILE.jsonl go together")
    if _CHAT.value and _SAMPLES.value is not None:
        raise InputError("--samples=FILE writes texts, not chats: leave out --chat")
    command.use_compilation_cache()
    import jax

    from lm.evaluation import sampling

    loaded = workdir.load_chosen()
    prompt, count = _PROMPT.value, _TOKENS.value
    trained_on = loaded.config.data.sequence_length
    if _SYSTEM.value and not _CHAT.value:
        raise InputError("--system=TEXT needs --chat")
    if warning := too_long(len(loaded.tokenizer.encode(prompt)[0]), count, trained_on):
        command.say(warning)
    with jax.set_mesh(loaded.run.mesh):
        trained, quantized = loaded.run.stored(loaded.state)
        if _SAMPLES.value is not None:
            _write_samples(loaded, trained, quantized)
            return
    sampler = sampling.Sampler(
        loaded.run.model,
        loaded.tokenizer,
        loss=loaded.run.objective.loss,
        quantized=quantized,
        chat=_CHAT.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
    )
    with jax.set_mesh(loaded.run.mesh):
        seed = command.SEED.value or 0
        if _CHAT.value:
            _chat(functools.partial(sampler.answer, trained, seed=seed, steps=count))
        else:
            pieces = sampler.stream(trained, prompt, seed, count)
            command.show(itertools.chain([prompt], pieces, ["\n"]))


def _write_samples(loaded: workdir.Loaded, trained: Any, quantized: Any) -> None:
    """Draws the texts that the file lacks, and writes them as they come."""
    from lm.rollouts import texts

    path, seed = Path(_SAMPLES.value), command.SEED.value or 0
    options = {
        "tokens": _TOKENS.value,
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
    }
    settings = {"model": command.chosen(), "step": loaded.step, "seed": seed}
    settings |= {"prompt": _PROMPT.value, **options}
    with writing(f"--samples={path}"):
        first, file = texts.written(path, settings), path.open("a")
    model, loss = loaded.run.model, loaded.run.objective.loss
    make = functools.partial(texts.make_draw_texts, model, loss, quantized, loaded.tokenizer)
    drawn = make(_PROMPT.value, **options)(trained, seed, first)
    with writing(f"--samples={path}"), file:
        for number in range(first, _COUNT.value):
            file.write(texts.line_of(next(drawn), number, settings))
            if (number + 1) % texts.ROWS == 0:
                file.flush()
                command.say(f"{number + 1} of {_COUNT.value} texts")
    command.say(f"{path}: {max(first, _COUNT.value)} texts, {first} of them there before")


def _chat(answer: Callable[..., Iterator[str]]) -> None:
    """Answers the prompt, or line after line with all that was said before."""
    from lm.data.chats import Message

    messages = [Message("system", _SYSTEM.value)] if _SYSTEM.value else []
    for line in [_PROMPT.value] if _PROMPT.value else _lines():
        messages.append(Message("user", line))
        said: list[str] = []
        pieces = answer(messages)
        command.show(itertools.chain(_kept(pieces, said), ["\n"]))
        messages.append(Message("assistant", "".join(said)))


def _kept(pieces: Iterator[str], said: list[str]) -> Iterator[str]:
    for piece in pieces:
        said.append(piece)
        yield piece


def _lines() -> Iterator[str]:
    """Lines of standard input, with a sign on a terminal that one is awaited."""
    while True:
        if sys.stdin.isatty():
            command.show(["> "])
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def too_long(prompt: int, tokens: int, trained_on: int) -> str:
    """A warning that a text may become longer than the texts of the training; "" if it cannot.

    Args:
      prompt: tokens of the prompt.
      tokens: --tokens.
      trained_on: data.sequence_length of the run.
    """
    if prompt + tokens <= trained_on:
        return ""
    return (
        f"warning: a prompt of {prompt:,} tokens and --tokens={tokens} exceed the "
        f"data.sequence_length={trained_on} of the run: the model has not been trained on the "
        "positions after it"
    )


if __name__ == "__main__":
    command.run(main)
