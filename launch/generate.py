"""Samples text from a trained run, or from a packed file of one, and shows it as it comes.

python -m launch.generate --workdir=runs/quickstart --prompt="def "
"""

import itertools

from absl import flags

from launch import command, workdir
from lm.errors import InputError

_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Tokens to add at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0 is off.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this total; 1 is off.")


def main() -> None:
    """Prints the prompt and its continuation, token by token, up to the end of text."""
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
    if warning := too_long(len(loaded.tokenizer.encode(prompt)[0]), count, trained_on):
        command.say(warning)
    sampler = sampling.Sampler(
        loaded.run.model,
        loaded.tokenizer,
        loss=loaded.run.objective.loss,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
    )
    with jax.set_mesh(loaded.run.mesh):
        trained, seed = loaded.run.plain(loaded.state), command.SEED.value or 0
        pieces = sampler.stream(trained, prompt, seed, count)
        command.show(itertools.chain([prompt], pieces, ["\n"]))


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
