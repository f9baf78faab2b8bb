"""Trains, evaluates and checkpoints a config; the same command again goes on where it stopped.

python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

import sys

from absl import flags

from launch import command, distributed
from lm.errors import InputError

_STOPPED = flags.DEFINE_integer(
    "stopped_code", 0, "Exit code of a run that a signal stopped, for who starts it again."
)


def main() -> None:
    """Runs the training and shows what came of it."""
    if command.CONFIG.value is None:
        raise InputError("--config=FILE.py is missing, for example --config=configs/quickstart.py")
    if not command.WORKDIR.value:
        raise InputError("--workdir=FOLDER is missing, for example --workdir=runs/quickstart")
    command.use_compilation_cache()
    distributed.join(command.CONFIG.value.distributed)
    distributed.run(_train)


def _train() -> None:
    import jax

    from lm.training import loop

    first = jax.process_index() == 0  # All do the same; one of them says so.
    say = command.say if first else lambda line: None
    try:
        result = loop.train(command.CONFIG.value, command.WORKDIR.value, say)
    except loop.Diverged as error:
        say(f"aborted: {error}")
        sys.exit(1)
    if not result.finished:
        say(
            f"stopped by a signal at step {result.step}; saved {result.checkpoint}. "
            "The same command goes on from there."
        )
        sys.exit(_STOPPED.value)
    if not first:
        return
    score = result.validation
    print(f"validation: {score.loss:.4f} nats/token, {score.bits_per_byte:.4f} bits/byte")
    if result.baseline is not None:
        order = command.CONFIG.value.evaluation.ngram_order
        print(f"byte {order}-gram, Witten-Bell: {result.baseline:.4f} bits/byte")
    print(f"checkpoint: {result.checkpoint}")
    print(f"curves: {command.WORKDIR.value}/curves.png")
    print(f'next: python -m launch.generate --model={command.WORKDIR.value} --prompt="def "')


if __name__ == "__main__":
    command.run(main, huge_pages=True)
