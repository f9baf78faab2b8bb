"""Samples text from a model and shows it as it comes, or talks with it.

python -m launch.generate --model=runs/quickstart --prompt="def "
python -m launch.generate --model=model.gguf --chat
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator

from absl import flags

from launch import command, workdir
from lm.errors import InputError

_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Tokens to add at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0 is off.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this total; 1 is off.")
_CHAT = flags.DEFINE_bool(
    "chat", False, "Answer --prompt, or else every line of standard input, by the chat template."
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
