"""The prompts of problems: their tokens, and the order in which they are asked.

N rows, P tokens of the longest prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.chats import Message, read_turns
from lm.data.layout import encode_prompt
from lm.data.problems import Problem
from lm.data.tokenizers import Tokenizer
from lm.errors import InputError

# Few lengths of prompts are compiled for: powers of two from here on.
_SHORTEST = 16


class Asked(NamedTuple):
    """The problems that can be asked.

    Attributes:
      problems: of the corpora, also those that cannot.
      kept: int64, the indices of those that can.
      lengths: int64, the number of tokens of the prompt of each of them.
      dropped: how many have a prompt that is too long.
    """

    problems: Sequence[Problem]
    kept: np.ndarray
    lengths: np.ndarray
    dropped: int


def prompt_of(problem: Problem, tokenizer: Tokenizer) -> np.ndarray:
    """The ids [n] int32 that an answer follows, n at least 1.

    Messages are written by the chat template of the tokenizer, up to where its next answer begins;
    a text follows the beginning of text.

    Raises:
      InputError: the template cannot render the messages, or the tokenizer gives an id outside its
        vocabulary.
    """
    prompt = problem.record["prompt"]
    if isinstance(prompt, str):
        ids, _ = tokenizer.encode(prompt)
        ids = np.concatenate([[tokenizer.beginning_of_text], ids]).astype(np.int32)
    else:
        roles, contents = read_turns(list(prompt), problem.name)
        ids = encode_prompt(list(map(Message, roles, contents)), tokenizer)
    if not len(ids):
        raise InputError(f"{problem.name}: the chat template writes nothing")
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise InputError(
            f"data.tokenizer: gives ids from {ids.min()} to {ids.max()} for {problem.name}; its "
            f"vocabulary has {tokenizer.vocab_size} entries"
        )
    return ids


def askable(problems: Sequence[Problem], tokenizer: Tokenizer, longest: int) -> Asked:
    """Encodes all prompts once, to say which have at most `longest` tokens.

    Raises:
      InputError: none has.
    """
    lengths = np.array([len(prompt_of(problems[i], tokenizer)) for i in range(len(problems))])
    kept = np.flatnonzero(lengths <= longest)
    if not len(kept):
        raise InputError(
            f"data.corpus: no prompt of {len(problems):,} has at most {longest} tokens, the "
            f"shortest has {min(lengths, default=0)}; valid: a longer data.sequence_length, a "
            "smaller rollouts.tokens or another rollouts.longest_prompt"
        )
    return Asked(problems, kept, lengths[kept].astype(np.int64), len(lengths) - len(kept))


def numbers_asked(seed: int, draw: int, groups: int, count: int) -> np.ndarray:
    """Which of `count` problems the groups of a draw are, int64 [groups].

    Draws follow each other through a new random order of all problems in every epoch; it depends
    on seed and epoch alone, so that a draw depends on no draw before it.
    """
    places = draw * groups + np.arange(groups, dtype=np.int64)
    epochs, positions = places // count, places % count
    found = np.empty(groups, np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng((seed, int(epoch))).permutation(count)
        found[epochs == epoch] = order[positions[epochs == epoch]]
    return found


def room_for(length: int) -> int:
    """P, the tokens that a prompt is padded to: a power of two, one of few."""
    return max(_SHORTEST, 1 << (length - 1).bit_length())


def padded(prompts: Sequence[np.ndarray], room: int) -> Mapping[str, Any]:
    """Prompts as the decoder reads them: int32 `tokens` and `mask`, [N, P], padded on the left."""
    tokens_NP = np.zeros((len(prompts), room), np.int32)
    mask_NP = np.zeros((len(prompts), room), np.int32)
    for row, ids in enumerate(prompts):
        tokens_NP[row, room - len(ids) :] = ids
        mask_NP[row, room - len(ids) :] = 1
    return {"tokens": tokens_NP, "mask": mask_NP}
