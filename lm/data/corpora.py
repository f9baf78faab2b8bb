"""Where documents come from: the standard library, TFDS, made tasks, a folder or a JSONL file.

A corpus is a random-access sequence of documents with a fixed split into training and validation.
"""

import contextlib
import difflib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from lm.data.converted import as_json_lines, is_records
from lm.data.documents import Corpus, Document
from lm.data.files import load_file, load_folder
from lm.data.json_lines import load_jsonl
from lm.data.records import load_stdlib, load_tfds
from lm.data.tasks.corpus import PREFIX, load_task
from lm.errors import InputError

__all__ = ["Corpus", "Document", "cache_directory", "load", "read"]

_VALID = (
    "valid are stdlib, tfds:NAME[/config], task:NAME[/count], a folder, or a file of records "
    "(.jsonl, .ndjson, .json, .parquet, .jsonl.gz, .jsonl.zst), also gs://"
)


def load(
    corpus: str, split: str, *, directory: str, validation_fraction: float
) -> tuple[Corpus, ...]:
    """Loads one split of every corpus.

    Args:
      corpus: `stdlib`, `tfds:NAME[/config]`, a made task (see `lm.data.tasks.corpus`), a folder or
        a FILE.jsonl; commas separate several.
        A folder's documents are all its files, at any depth, that have no NUL byte and are not
        hidden. A JSONL line is an object with the string `text`, or `prompt` and `response`, or
        `prompt` and `answer` of a problem, or a chat: `messages`, a list of {"role": ...,
        "content": ...}; blank lines are skipped.
        Other files of records, see `lm.data.converted`, are converted to JSON lines in the cache. A
        TFDS dataset has features of these names, but for chats. What is in a bucket, as
        gs://BUCKET/text.jsonl, is copied into the cache first.
      split: `train` or `validation`.
      directory: where corpora are prepared and cached; "" is `cache_directory("")`, and for
        `tfds:` the environment variable TFDS_DATA_DIR where it is set.
      validation_fraction: the share of documents that is held out: by a hash of their path (stdlib,
        folder), of the line (JSONL) or of the prompt (problems). A TFDS dataset's own split
        `validation`, or else `test`, is used where it has one; where not, the last records of
        `train` are held out, which TFDS put in a random but fixed order when it prepared them.

    Returns:
      One corpus for each name in `corpus`, in that order.

    Raises:
      InputError: a name means nothing, a line is malformed, or a split has no text.
    """
    if split not in ("train", "validation"):
        raise InputError(f"split must be train or validation, got {split!r}")
    if not 0.0 < validation_fraction < 1.0:
        raise InputError(
            f"data.validation_fraction must lie between 0 and 1, got {validation_fraction}"
        )
    names = [name.strip() for name in corpus.split(",")]
    return tuple(_load_one(name, split, directory, validation_fraction) for name in names)


def read(path: str) -> Corpus:
    """Every document of a text file, a FILE.jsonl, a folder or a made task, without a split.

    Raises:
      InputError: there is no such file or task, a line is malformed, or there is no text in it.
    """
    source = Path(path).expanduser()
    if path.startswith(PREFIX):
        corpus = load_task(path, "train", 0.0)
    elif source.is_dir():
        corpus = load_folder(path, source, "train", 0.0)
    elif is_records(source) and source.is_file():
        lines = as_json_lines(source, cache_directory(""))
        corpus = load_jsonl(path, lines, "train", 0.0, source)
    elif source.is_file():
        corpus = load_file(path, source)
    else:
        raise InputError(f"{path}: no such file or folder")
    if not _has_text(corpus):
        raise InputError(f"{path}: there is no text in it")
    return corpus


def cache_directory(directory: str) -> Path:
    """Returns the folder of the cache; "" is `$XDG_CACHE_HOME/nibble`, or `~/.cache/nibble`.

    Raises:
      InputError: it is in a bucket.
    """
    if "://" in directory:
        raise InputError(
            f"data.directory={directory!r} must be a local folder: every machine has its own cache"
        )
    if directory:
        return Path(directory).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nibble"


def _load_one(name: str, split: str, directory: str, fraction: float) -> Corpus:
    if name.startswith(PREFIX):
        return _checked(load_task(name, split, fraction), split, fraction)
    path = _local(name, directory) if "://" in name else Path(name).expanduser()
    if name == "stdlib":
        corpus = load_stdlib(split, cache_directory(directory), fraction)
    elif name.startswith("tfds:"):
        folder = cache_directory(directory or os.environ.get("TFDS_DATA_DIR", ""))
        corpus = load_tfds(name, split, folder, fraction)
    elif name and path.is_dir():
        corpus = load_folder(name, path, split, fraction)
    elif is_records(path) and path.is_file():
        lines = as_json_lines(path, cache_directory(directory))
        corpus = load_jsonl(name, lines, split, fraction, path)
    elif path.is_file():
        raise InputError(f"data.corpus {name!r}: not a file of records; {_VALID}")
    else:
        raise InputError(f"data.corpus {name!r}: does not exist; {_VALID}{_hint(name)}")
    return _checked(corpus, split, fraction)


def _checked(corpus: Corpus, split: str, fraction: float) -> Corpus:
    if not _has_text(corpus):
        raise InputError(
            f"data.corpus {corpus.name!r}: no text in its {split} split at data.validation_fraction"
            f" = {fraction:g}; it needs more documents, or another fraction"
        )
    return corpus


def _local(name: str, directory: str) -> Path:
    """A copy of a file or folder of a bucket in the cache, where documents are read one by one.

    It is made once: text that has changed needs another name, or an empty cache.

    Raises:
      InputError: there is nothing at that address, or no way to it.
    """
    target = cache_directory(directory) / "buckets" / name.replace("://", "/")
    if target.exists():
        return target
    try:
        source = epath.Path(name)
        folder = source.is_dir()
        files = list(_files(source)) if folder else [source]
        if not files or not files[0].exists():
            raise InputError(f"data.corpus {name!r}: does not exist; {_VALID}")
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent)) / target.name
        for file in files:
            copy = scratch / file.relative_to(source) if folder else scratch
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        with contextlib.suppress(OSError):  # Another process was faster.
            scratch.rename(target)
        shutil.rmtree(scratch.parent)
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"data.corpus {name!r}: cannot be read: {reason}") from None
    return target


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _has_text(corpus: Corpus) -> bool:
    return any(text for document in corpus.documents for text, _ in document.spans)


def _hint(name: str) -> str:
    parent = Path(name).expanduser().parent
    siblings = sorted(os.listdir(parent)) if parent.is_dir() else []
    names = ["stdlib", *(str(Path(name).parent / sibling) for sibling in siblings)]
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
