"""What declares the end and the beginning of text of a tokenizer.json, and its chat template."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from etils import epath

from lm.errors import InputError

CHAT_TEMPLATE = "chat_template.jinja"
END_OF_TEXT = "<|endoftext|>"

# Names by which a special token of a tokenizer.json is known as an end or a beginning of text.
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot|>", "[EOS]", "[SEP]")
BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")

# Value of data.end_of_text and data.beginning_of_text in records of older commits: the first entry
# of the vocabulary, special or not, that is one of `ENDS` opens and closes every document.
GUESSED = "guessed"

# A tokenizer_config.json or a chat template is small; more is not one.
_MOST_BYTES = 10_000_000


def tokenizer_config(path: Path) -> dict[str, Any]:
    """The content of a tokenizer_config.json, {} where there is none.

    Raises:
      InputError: it is no JSON object, or too large to be one.
    """
    if "://" in str(path) or not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None
    return config


def chat_template(where: str, config: dict[str, Any]) -> str | None:
    """The source of the chat template that comes with a tokenizer.json.

    That is the chat_template.jinja beside it, else chat_template of its tokenizer_config.json: a
    string, or a list of templates of which one is named "default".

    Args:
      where: the tokenizer.json, which may be in a bucket.
      config: the content of its tokenizer_config.json.

    Raises:
      InputError: the file is not UTF-8, or too large to be a template.
    """
    path = epath.Path(where).with_name(CHAT_TEMPLATE)
    if path.is_file():
        try:
            if path.stat().length > _MOST_BYTES:
                raise ValueError(f"larger than {_MOST_BYTES:,} bytes")
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no chat template: {error}") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def content(token: Any) -> str:
    """The text of a token in a tokenizer_config.json, a string or an object; "" for none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def end_among(special: list[str], vocabulary: Collection[str], where: str) -> str:
    """The one special token with the name of an end of text.

    Of a tokenizer without any special token, which declares nothing, the one entry of the
    vocabulary with such a name.

    Raises:
      InputError: there is none, or more than one.
    """
    found = [name for name in ENDS if name in (special or vocabulary)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"data.tokenizer {where!r}: its end of text is ambiguous: {', '.join(found)}; name it "
            "with data.end_of_text"
        )
    raise InputError(
        f"data.tokenizer {where!r}: declares no end of text; name it with data.end_of_text, one of "
        f"its special tokens: {', '.join(special[:20]) or 'it has none'}"
    )
