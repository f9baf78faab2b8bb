"""Where a long text may be cut, so that its parts have the tokens that they have in the whole."""

import json
import re
from collections.abc import Iterator

# Characters of a text that are encoded at once, where the tokenizer allows a cut.
PIECE = 1 << 16

# What a merge may not reach across: a word with what precedes it, a number of up to three digits,
# punctuation, white space; as in GPT-4's tokenizer, but a line break takes the next line's
# indentation along. On the standard library, at 2,048 entries, a token so covers 3.11 bytes; with
# GPT-2's pattern 3.03, with GPT-4's 2.95.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*(?=\S))?"
    r"|\s*[\r\n]+[ \t]*(?=\S)|\s+(?!\S)|\s+"
)

# Patterns that end a word before every space between a printable ASCII character and an ASCII
# letter, whatever stands around them: this one, and those of cl100k, Llama 3 and Qwen 2.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTTING = (
    PATTERN,
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
)
_CUT = re.compile("(?<=[!-~]) (?=[A-Za-z])")


def at_spaces(text: str) -> Iterator[int]:
    """Yields the first cut after every `PIECE` characters."""
    start = 0
    while start + PIECE < len(text) and (found := _CUT.search(text, start + PIECE)):
        start = found.start()
        yield start


def may_be_at_spaces(definition: str, vocabulary: dict[str, int]) -> bool:
    """Whether a byte-level tokenizer encodes text on both sides of every such space by itself.

    Args:
      definition: the content of a tokenizer.json.
      vocabulary: its entries.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    content = json.loads(definition)
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    byte_level = steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if len(steps) == 1:
        words = steps[0].get("use_regex", True)  # The pattern of GPT-2, which cuts there as well.
    else:
        split = steps[0]
        words = (
            len(steps) == 2
            and split.get("type") == "Split"
            and (split.get("pattern") or {}).get("Regex") in CUTTING
            and split.get("behavior") == "Isolated"
            and not split.get("invert")
            and not steps[1].get("use_regex", True)
        )
    model = content.get("model") or {}
    # An added token that is not special may stand across a cut.
    special = all(token.get("special") for token in content.get("added_tokens") or ())
    bytes_are_there = vocabulary.keys() >= set(ByteLevel.alphabet())
    plain = model.get("type") == "BPE" and not model.get("dropout")
    return bool(byte_level and words and plain and special and bytes_are_there)
