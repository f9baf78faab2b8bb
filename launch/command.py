"""What all commands share: flags, the config, and one clear line for the user's mistakes."""

import contextlib
import difflib
import keyword
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from lm.errors import InputError
from lm.flat import leaves

BAD_INPUT = 2  # exit code

# Flags of more than one command; a flag of one command stands in its module.
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Python file with get_config(), as FILE.py or FILE.py:ARGUMENT."
)
MODEL = flags.DEFINE_string(
    "model",
    None,
    "Work directory, packed file, Hugging Face folder or .gguf file that is read.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run: local or gs://.")
PACKED = flags.DEFINE_string("packed", None, "An older name of --model for a packed file.")
JSON = flags.DEFINE_bool("json", False, "One JSON object on standard output, nothing else.")
OUTPUT = flags.DEFINE_string("output", None, "File or folder to write.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
DEVICES = flags.DEFINE_integer(
    "devices", None, "Plan for this number of devices, not those at hand."
)
SLICES = flags.DEFINE_integer(
    "slices", 1, "launch.pod (tpu, gke), launch.plan: slices that train together."
)
PROCESSES = flags.DEFINE_integer(
    "processes",
    None,
    "Processes of one training, with --coordinator (1: alone, even in a cluster). launch.ablate: "
    "runs at a time, 1 by default.",
)
SPLIT = flags.DEFINE_string("split", None, "Split of the corpus: train or validation.")
NAME = flags.DEFINE_string(
    "name",
    "",
    "launch.pod: of what is launched. launch.score: of the reference that the scores are, "
    "reference_nll by default, prior_nll without context; or another key of "
    "objective.references. likelihood is exp(-loss), our reading of frequency_equity's. "
    "teacher_top_k; with --config of a student: teacher_sorted, chunk_log_probability.",
)
SEED = flags.DEFINE_integer(
    "seed",
    None,
    "launch.generate: of the draws, 0 by default. launch.results --trace: of the runs to print.",
)
PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Folder of a profiler's trace. launch.benchmark: written, of each item. launch.plan: read, its "
    "times beside the estimate of --config; --name chooses one of several steps.",
)
CORPUS = flags.DEFINE_string("corpus", "", "Text to use instead, in the form of data.corpus.")


def run(
    main: Callable[..., None],
    actions: Sequence[str] = (),
    most: int = 0,
    *,
    huge_pages: bool = False,
) -> None:
    """Parses the flags and calls `main`; bad input becomes one line and exit code 2.

    With `actions` the command takes the name of one, which `main` gets. `most` other arguments that
    are no flags may follow, and `main` gets them, too. With `huge_pages` the process may restart
    itself first: for commands that train.
    """

    def guarded(arguments):
        try:
            taken = 1 + bool(actions) + most
            given, rest = arguments[1:taken], arguments[taken:]
            if actions and (not given or given[0] not in actions):
                raise InputError(f"say what to do, one of: {', '.join(actions)}")
            if rest:
                raise InputError(f"unknown argument {rest[0]!r}: flags start with --")
            main(*given)
            sys.stdout.flush()
        except InputError as error:
            _refuse(str(error))
        except BrokenPipeError:
            _drop_output()

    if huge_pages:
        use_huge_pages()
    # Orbax logs an error with its traceback, and then raises it.
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _unraisable
    app.run(guarded, flags_parser=_parse)


def chosen() -> str:
    """The model that --model, --workdir or --packed names; "" for none."""
    return MODEL.value or WORKDIR.value or PACKED.value or ""


def say(line: str) -> None:
    """Shows a line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


def show(pieces: Iterable[str]) -> None:
    """Writes each piece of text to standard output as soon as it is there."""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """For when the reader of standard output, such as `head`, wants no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned: the first to the left, the others, which are numbers, to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def write_text(path: Path, content: str) -> None:
    """Replaces the content of a file; if that fails, the file is unchanged."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the content of a file; if that fails, the file is unchanged."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def split(default: str) -> str:
    """The value of --split.

    Raises:
      InputError: it is not a split.
    """
    value = default if SPLIT.value is None else SPLIT.value
    if value not in ("train", "validation"):
        raise InputError(f"--split={value} is not one of: train, validation")
    return value


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told otherwise."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "nibble" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def use_huge_pages() -> None:
    """Starts this process anew with huge pages for malloc, where the kernel leaves that to us.

    XLA on CPU takes the temporary memory of a step from malloc and gives it back after the step; in
    pages of 4 KiB, page faults are a large part of a small model's step (docs/speed.md). The C
    library reads this setting only when a process starts.
    """
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "hugetlb" in tunables or not switch.exists() or "[madvise]" not in switch.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Within it ml_collections may load a file, by a call that Python has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def load_config(path: Path, argument: str) -> ConfigDict:
    """The config of a file of this repository; LookupError for an unknown argument."""
    with _loading():
        return config_flags.ConfigFileFlagParser("config").parse(f"{path}:{argument}")


def _unraisable(unraisable: Any) -> None:
    """As usual, except for TensorStore's late news: reads or writes that fail when one has failed.

    The first failure has been raised, and has closed the event loop that waits for the others.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def _parse(arguments: list[str]) -> list[str]:
    try:
        with _loading():
            _check_config(arguments)
            # ml_collections looks for overrides in sys.argv, not in what it is given.
            sys.argv[:] = map(_quoted, sys.argv)
            return flags.FLAGS([_quoted(argument) for argument in arguments])
    except InputError as error:
        _refuse(str(error))
    except (flags.Error, ValueError, TypeError) as error:
        _refuse(" ".join(str(error).split()))


def _quoted(argument: str) -> str:
    """A key such as quantization.from, a word of Python's own, as ml_collections can read it."""
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--config."):
        return argument
    first, *keys = flag.split(".")
    quoted = (f'["{key}"]' if keyword.iskeyword(key) else f".{key}" for key in keys)
    return f"{first}{''.join(quoted)}{equals}{value}"


def config_arguments(arguments: Sequence[str] | None = None) -> list[str]:
    """--config and --config.key=value as they were given, the value always in the same word."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    found = []
    for i, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if re.fullmatch(r"--?(no)?config([.\[].+)?", flag):
            whole = equals or i + 1 == len(words) or words[i + 1].startswith("--")
            word = word if whole else f"{word}={words[i + 1]}"
            flag, equals, value = word.partition("=")
            # What `_quoted` has done to sys.argv is undone: another command does it again.
            found.append(re.sub(r'\["(\w+)"\]', r".\1", flag) + equals + value)
    return found


def config_file() -> str:
    """The file that --config names, without its argument; "" where there is none."""
    named = [word for word in config_arguments() if re.match(r"--?config=", word)]
    return named[-1].partition("=")[2].partition(":")[0] if named else ""


_mesh: dict[str, int] = {}


def mesh() -> dict[str, int]:
    """The sizes of --config.mesh.AXIS=SIZE of a command that takes its config from a run."""
    return dict(_mesh)


def _take_mesh(arguments: list[str]) -> None:
    """Takes --config.mesh.AXIS=SIZE out of the arguments where there is no --config."""
    if config_file():
        return
    found = re.compile(r"--?config\.mesh\.(data|fsdp|tensor|sequence)=(-?\d+)")
    for words in (arguments, sys.argv):
        for word in list(words):
            if match := found.fullmatch(word):
                _mesh[match[1]] = int(match[2])
                words.remove(word)


def _check_config(arguments: list[str]) -> None:
    """Refuses what ml_collections would refuse with a traceback: file, code and keys."""
    name, keys = None, []
    _take_mesh(arguments)
    for argument in config_arguments(arguments[1:]):
        flag, _, value = argument.partition("=")
        if flag.lstrip("-") == "config":
            name = value
        else:
            keys.append(flag.lstrip("-").removeprefix("no").removeprefix("config."))
    if name is None:
        if keys:
            raise InputError(f"--config.{keys[0]} needs --config=FILE.py before it")
        return
    path = name.partition(":")[0]
    if not Path(path).is_file():
        raise InputError(f"--config={name}: no such file{nearest(path, _config_files())}")
    try:
        config = config_flags.ConfigFileFlagParser("config").parse(name)
        valid = [key for key, _ in leaves(config)]
    except Exception as error:  # a config file is the user's code and may raise anything
        # ml_collections raises it again, with the whole traceback as its text.
        if isinstance(error.__context__, InputError):
            raise InputError(f"--config={path}: {error.__context__}") from None
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else 1)
        reason = str(error.args[0] if error.args else "").replace("\\n", " ").strip("'")
        # ml_collections lists the whole section before it names the nearest key.
        reason = re.sub(r" Other fields present: .*?(?=Did you mean|$)", " ", reason)
        kind = type(error).__name__
        raise InputError(f"{path}:{line}: {kind}: {' '.join(reason.split())}") from None
    for key in keys:
        if key not in valid:
            raise InputError(f"unknown key --config.{key}{nearest(key, valid)}")


def _config_files() -> list[str]:
    files = [p for p in sorted(Path("configs").rglob("*.py")) if p.stem != "__init__"]
    return [str(p) for p in files if p.parent.name != "sections"]


def nearest(name: str, valid: list[str]) -> str:
    """A hint with the nearest valid name, or all of them when none is near."""
    if near := difflib.get_close_matches(name, valid, n=1):
        return f" (did you mean {near[0]}?)"
    # A key in the wrong section is not near as a string.
    if same := [key for key in valid if key.split(".")[-1] == name.split(".")[-1]]:
        return f" (did you mean {same[0]}?)"
    return f"; valid: {', '.join(valid)}"
