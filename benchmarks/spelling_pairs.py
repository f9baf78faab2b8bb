"""Writes pairs of answers that differ in spelling alone: British is chosen, American is rejected.

python benchmarks/spelling_pairs.py --output=pairs.jsonl [--count=300] [--seed=0]

Each line has a prompt, a chosen and a rejected answer: one sentence about a word, spelt in both
ways. No two lines are the same. Words and sentences are in this file; which of them meet is drawn
from the seed.
"""

import argparse
import itertools
import random
from pathlib import Path

from lm import strict_json

# British and American spelling of the same word.
NOUNS = """colour color, flavour flavor, harbour harbor, neighbour neighbor, rumour rumor, humour
humor, odour odor, vapour vapor, parlour parlor, armour armor, labour labor, favour favor, honour
honor, behaviour behavior, endeavour endeavor, centre center, theatre theater, fibre fiber, litre
liter, metre meter, spectre specter, calibre caliber, sabre saber, defence defense, licence
license, offence offense, catalogue catalog, dialogue dialog, programme program, jewellery
jewelry, grey gray, tyre tire, plough plow, moustache mustache, pyjamas pajamas, aluminium
aluminum, mould mold, storey story, kerb curb, cheque check"""
VERBS = """organise organize, recognise recognize, realise realize, apologise apologize, criticise
criticize, memorise memorize, summarise summarize, analyse analyze, paralyse paralyze, minimise
minimize, maximise maximize, emphasise emphasize, standardise standardize, authorise authorize,
finalise finalize, modernise modernize, prioritise prioritize, categorise categorize"""
OF_NOUNS = (
    ("Say something about the picture.", "The {} was the first thing that everyone noticed."),
    ("What did the letter mention?", "It mentioned the {} and nothing else."),
    ("What do you remember of the village?", "I remember the {} better than anything else."),
    ("What is the story about?", "It is about a {} that changed a whole town."),
    ("What surprised the visitors?", "They were surprised by the {} near the old bridge."),
    ("What would you ask the expert?", "I would ask how the {} was described in those days."),
    ("Write a short sentence.", "Nobody in the room had ever seen such a {}."),
    ("What did the report leave out?", "The report left out the {} on the last page."),
)
OF_VERBS = (
    ("What does the team plan to do?", "They plan to {} everything before the end of the month."),
    ("What should I do first?", "You should {} the main points before you go on."),
    ("What did the teacher ask for?", "She asked us to {} the results by Friday."),
    ("Why did the meeting take so long?", "It took some time to {} what had happened."),
    ("Write a short sentence.", "It is never too late to {} a good idea."),
    ("How can this be improved?", "We could {} the parts that matter most."),
)


def records() -> list[dict[str, str]]:
    """Every word in every sentence, in a fixed order."""
    found = []
    for words, sentences in ((NOUNS, OF_NOUNS), (VERBS, OF_VERBS)):
        pairs = [entry.split() for entry in words.split(",")]
        for (british, american), (prompt, answer) in itertools.product(pairs, sentences):
            record = {"prompt": [{"role": "user", "content": prompt}]}
            for name, word in (("chosen", british), ("rejected", american)):
                record[name] = [{"role": "assistant", "content": answer.format(word)}]
            found.append(record)
    return found


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    every = records()
    if not 1 <= options.count <= len(every):
        parser.error(f"--count={options.count}: valid: 1 to {len(every)}")
    chosen = random.Random(options.seed).sample(every, options.count)
    lines = "".join(strict_json.dumps(record) + "\n" for record in chosen)
    Path(options.output).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
