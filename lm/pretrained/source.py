"""A model that others have trained, as it lies in their files."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm import strict_json
from lm.data import declared
from lm.data.corpora import cache_directory
from lm.data.tokenizers import Subwords
from lm.errors import InputError, shown
from lm.model.config import check_choice
from lm.pretrained import gguf_names, gguf_tokenizer
from lm.pretrained.families import FAMILIES
from lm.pretrained.family import read_model
from lm.pretrained.gguf_file import read_gguf
from lm.pretrained.safetensors_file import Stored, open_safetensors

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"

# Bytes of a tokenizer.json, and of a JSON file that is no vocabulary.
_MOST_TOKENIZER = 256 * 2**20
_MOST_JSON = 64 * 2**20


class Pretrained(NamedTuple):
    """What the files say; the tensors are read when they are asked for.

    Attributes:
      where: the folder or file.
      model_type: a name of `FAMILIES`.
      section: keys of the model section that decide what is computed.
      vocab_size: rows of the table, which may be more than the tokenizer has entries.
      tensors: name -> tensor, by the names of a Hugging Face folder.
      tokenizer: of the model.
    """

    where: str
    model_type: str
    section: dict[str, Any]
    vocab_size: int
    tensors: Mapping[str, Stored]
    tokenizer: Subwords


def is_pretrained(path: str) -> bool:
    """Whether a path is that of a Hugging Face folder or a .gguf file.

    Raises:
      InputError: it is a folder of adapters without the model below them.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file() and (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{path}: adapters without their model, which are not read; valid: the folder of a "
                "model that peft's merge_and_unload has put them into"
            )
        # That of a run has sections.
        return config.is_file() and "model_type" in read_json(config)
    return path.endswith(".gguf")


def open_pretrained(path: str) -> Pretrained:
    """Reads what is small and checks that all tensors are there; `load_params` reads those.

    Args:
      path: a Hugging Face folder or a .gguf file.

    Raises:
      InputError: missing, damaged or unknown; one line that names the file.
    """
    if path.endswith(".gguf"):
        return _open_gguf(Path(path).expanduser())
    return _open_folder(Path(path).expanduser())


def _open_folder(folder: Path) -> Pretrained:
    config = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not config.is_file():
        raise InputError(f"{folder}: there is no config.json in it")
    values = read_json(config)
    model_type = values.get("model_type")
    check_choice(f"{config}: model_type", shown(model_type, 40), tuple(FAMILIES))
    section, vocabulary = read_model(FAMILIES[model_type], values, str(config))
    tensors = _tensors(folder)
    tokenizer = read_tokenizer(folder)
    check_vocabulary(tokenizer, vocabulary, str(folder))
    return Pretrained(str(folder), model_type, section, vocabulary, tensors, tokenizer)


def _open_gguf(path: Path) -> Pretrained:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    file = read_gguf(path)
    values = gguf_names.settings(file, str(path))
    section, vocabulary = read_model(FAMILIES[values["model_type"]], values, str(path))
    tensors = gguf_names.tensors(file, values, str(path))
    files = _tokenizer_files(file.metadata, str(path))
    try:
        tokenizer = read_tokenizer(cached_files(files))
    except InputError as error:  # It names the copy in the cache.
        raise InputError(f"{path}: {error}") from None
    check_vocabulary(tokenizer, vocabulary, str(path))
    return Pretrained(str(path), values["model_type"], section, vocabulary, tensors, tokenizer)


def _tokenizer_files(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """The files of a Hugging Face folder that say what a GGUF file says of its tokenizer."""
    ends = gguf_tokenizer.special_tokens(metadata, where)
    files = {
        "tokenizer.json": gguf_tokenizer.tokenizer_json(metadata, where),
        "tokenizer_config.json": strict_json.dumps({f"{k}_token": v for k, v in ends.items()}),
    }
    template = gguf_tokenizer.chat_template(metadata, where)
    return files | ({declared.CHAT_TEMPLATE: template} if template else {})


def check_vocabulary(tokenizer: Subwords, vocabulary: int, where: str) -> None:
    """Raises InputError where the tokenizer has entries that the table has no row for."""
    if tokenizer.vocab_size > vocabulary:
        raise InputError(
            f"{where}: its tokenizer has {tokenizer.vocab_size:,} entries and its table "
            f"{vocabulary:,} rows; one of them is of another model"
        )


def cached_files(files: Mapping[str, str]) -> Path:
    """A folder of the cache with these files, made once."""
    digest = hashlib.sha256(strict_json.dumps(dict(files)).encode()).hexdigest()
    folder = cache_directory("") / "tokenizers" / digest
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
        for name, content in files.items():
            # As it is: no line end may change.
            (scratch / name).write_bytes(content.encode())
        try:
            os.replace(scratch, folder)
        except OSError:  # Another process was faster.
            shutil.rmtree(scratch)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The content of a small JSON file, an object.

    Raises:
      InputError: missing, too large, or something else.
    """
    try:
        if (size := path.stat().st_size) > _MOST_JSON:
            raise InputError(f"{path}: {size:,} bytes are too many; valid: up to {_MOST_JSON:,}")
        content = strict_json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {' '.join(str(error).split()):.100}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


def read_tokenizer(folder: Path) -> Subwords:
    """The tokenizer of a folder, with what the files beside it declare.

    Raises:
      InputError: there is none, or one of another form.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        other = next(
            (name for name in ("tokenizer.model", "vocab.json") if (folder / name).exists()), ""
        )
        hint = f"; {other} alone is not read: save the tokenizer with transformers" if other else ""
        raise InputError(f"{folder}: there is no tokenizer.json in it{hint}")
    try:
        if (size := path.stat().st_size) > _MOST_TOKENIZER:
            raise ValueError(f"{size:,} bytes are too many; valid: up to {_MOST_TOKENIZER:,}")
        definition = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return Subwords(definition, str(path))


def _tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder, from one file or from those of its index."""
    index = folder / _INDEX
    if index.is_file():
        return _indexed(folder, index)
    if (folder / _WEIGHTS).is_file():
        return open_safetensors(folder / _WEIGHTS)
    if pickled := sorted(p.name for p in folder.glob("*.bin")):
        raise InputError(
            f"{folder}: {pickled[0]} is a pickle, which can execute code, and is never read; "
            "convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER, "
            "safe_serialization=True)"
        )
    raise InputError(f"{folder}: there is neither {_WEIGHTS} nor {_INDEX} in it")


def _indexed(folder: Path, index: Path) -> dict[str, Stored]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise InputError(f"{index}: weight_map must map names of tensors to names of files")
    files = {}
    for name in sorted(set(places.values())):
        # A link is followed, wherever it leads: the cache of Hugging Face is made of links.
        if Path(name).name != name or not name.endswith(".safetensors") or len(name) > 120:
            raise InputError(
                f"{index}: {shown(name)!r} is not the name of a .safetensors file beside it"
            )
        if not (folder / name).is_file():
            raise InputError(f"{index}: {shown(name, 120)} is missing")
        files[name] = open_safetensors(folder / name)
    missing = [name for name, place in places.items() if name not in files[place]]
    if missing:
        raise InputError(f"{index}: {places[missing[0]]} has no tensor {shown(missing[0])}")
    return {name: files[place][name] for name, place in places.items()}
