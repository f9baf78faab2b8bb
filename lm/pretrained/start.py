"""What a config needs to know of the model that a run begins with."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from lm import strict_json
from lm.data import declared
from lm.data.tokenizers import Subwords
from lm.errors import InputError
from lm.pretrained.source import Pretrained, cached_files, is_pretrained, open_pretrained, read_json

# Keys of a model section that are a matter of the machine; a config has its own.
OF_THE_MACHINE = ("attention", "remat", "unroll", "dtype", "param_dtype", "plain_autodiff")


class Description(NamedTuple):
    """Keys of a config.

    Attributes:
      section: of `model`.
      tokenizer, end_of_text, beginning_of_text, vocab_size: of `data`.
      family: of `initialise`; "" for a run.
    """

    section: dict[str, Any]
    tokenizer: str
    end_of_text: str
    beginning_of_text: str
    vocab_size: int
    family: str


@functools.lru_cache(maxsize=1)  # Commands read a config twice.
def describe(source: str) -> Description:
    """The model in a work directory, a Hugging Face folder or a .gguf file.

    Raises:
      InputError: there is none.
    """
    if not source:
        raise InputError(
            "configs/finetune.py:SOURCE needs a source: a Hugging Face folder, a .gguf file or a "
            "work directory"
        )
    if is_pretrained(source):
        return of_files(open_pretrained(source))
    config = Path(source).expanduser() / "config.json"
    if not config.is_file():
        raise InputError(
            f"{source}: neither a Hugging Face folder, nor a .gguf file, nor a work directory"
        )
    return _of_run(config)


def of_files(found: Pretrained) -> Description:
    """That of a model of others.

    Its tokenizer is put into the cache: a run then does not depend on files that may go away, and
    the tokenizer in a .gguf has a path.
    """
    tokenizer = found.tokenizer
    return Description(
        found.section,
        str(cached_files(tokenizer_files(tokenizer)) / "tokenizer.json"),
        tokenizer.end_of_text_token,
        tokenizer.beginning_of_text_token,
        found.vocab_size,
        found.model_type,
    )


def _of_run(path: Path) -> Description:
    record = read_json(path)
    try:
        config, vocabulary = record["config"], record["vocab_size"]
        section = {k: v for k, v in config["model"].items() if k not in OF_THE_MACHINE}
        data = config["data"]
        ends = data["end_of_text"], data["beginning_of_text"]
        family = config.get("initialise", {}).get("family", "")
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path}: neither that of a run nor of a model with a model_type"
        ) from None
    definition = path.with_name("tokenizer.json")
    if not definition.is_file():
        return Description(section, data["tokenizer"], *ends, 0, "")
    return Description(section, str(definition), *ends, vocabulary, family)


def tokenizer_files(tokenizer: Subwords) -> dict[str, str]:
    """Name -> content of the files of a tokenizer in a Hugging Face folder."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.end_of_text_token,
        "bos_token": tokenizer.beginning_of_text_token,
    }
    files = {
        "tokenizer.json": tokenizer.definition,
        "tokenizer_config.json": strict_json.dumps(settings, indent=2) + "\n",
    }
    if tokenizer.chat_template:
        files[declared.CHAT_TEMPLATE] = tokenizer.chat_template
    return files
