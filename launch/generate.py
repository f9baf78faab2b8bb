"""Samples text from a trained run, or from a packed file of one, with a KV cache.

python -m launch.generate --workdir=runs/quickstart --prompt="def "
"""

from absl import flags

from launch import command, workdir
from lm.errors import InputError

_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Tokens to add at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0 is off.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this total; 1 is off.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")


def main() -> None:
    """Prints the prompt and its continuation."""
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
    sampler = sampling.Sampler(
        loaded.run.model,
        loaded.tokenizer,
        loss=loaded.run.objective.loss,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
    )
    length, trained_on = _length(loaded), loaded.config.data.sequence_length
    if length > trained_on:
        command.say(
            f"prompt and --tokens={_TOKENS.value} are {length} tokens together; the model was "
            f"trained on {trained_on} at most (data.sequence_length)"
        )
    print(_PROMPT.value, end="", flush=True)
    with jax.set_mesh(loaded.run.mesh):
        trained = loaded.run.plain(loaded.state)
        for piece in sampler.stream(trained, _PROMPT.value, _SEED.value, _TOKENS.value):
            print(piece, end="", flush=True)
    print()


def _length(loaded: workdir.Loaded) -> int:
    """Tokens of the prompt, its beginning included, and those that may be added."""
    ids, _ = loaded.tokenizer.encode(_PROMPT.value)
    return 1 + len(ids) + _TOKENS.value


if __name__ == "__main__":
    command.run(main)
