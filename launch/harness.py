"""lm_eval, the evaluation harness of others, with the models of this repository (extra `eval`).

python -m launch.harness run --model nibble --model_args model=runs/quickstart \\
    --tasks additions --include_path configs/tasks

is `lm_eval run ...` with one more model, `nibble`: a work directory, a packed file, a Hugging Face
folder or a .gguf file. A program calls `register()` before `lm_eval.simple_evaluate`.
"""

import sys

from launch import command, workdir
from lm.errors import InputError
from lm.evaluation import harness


def register() -> type:
    """Makes the model `nibble` known to lm_eval, once; returns its class.

    Raises:
      InputError: lm_eval is not installed.
    """
    return harness.register(lambda model, step: workdir.load_any(model, step, "model"))


def main() -> None:
    """Runs the command line of lm_eval."""
    command.use_compilation_cache()
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(command.BAD_INPUT)


if __name__ == "__main__":
    main()
