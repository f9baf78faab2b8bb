"""Writes English text for studies: the language reference of Python and the King James Bible.

python benchmarks/english_text.py --output=english.jsonl

A document is a topic of pydoc_data.topics, or a chapter of the Bible, a verse a line and without
the numbers of the verses. The Bible is what the program `bible` prints, of Debian's package
bible-kjv. 4.7 million bytes in 1,268 documents with Python 3.11, in a fixed order.
"""

import argparse
import itertools
import shutil
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

from lm import strict_json


def topic_documents() -> list[str]:
    """The topics in the order of their names."""
    return [topics[name].strip() + "\n" for name in sorted(topics)]


def bible_documents(printed: str) -> list[str]:
    """The chapters of "Ge1:1 In the beginning ...", one verse a line."""
    verses = [line.split(" ", 1) for line in printed.splitlines() if line]
    chapters = itertools.groupby(verses, key=lambda verse: verse[0].split(":")[0])
    return ["".join(text + "\n" for _, text in verses) for _, verses in chapters]


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    output = parser.parse_args().output
    program = shutil.which("bible")
    if program is None:
        parser.error("there is no program `bible`; install Debian's package bible-kjv")
    command = [program, "-f", "Gen1:1-Rev22:21"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    documents = topic_documents() + bible_documents(printed)
    lines = "".join(strict_json.dumps({"text": text}) + "\n" for text in documents)
    try:
        Path(output).write_text(lines, encoding="utf-8")
    except OSError as error:
        parser.error(f"--output={output}: {error.strerror}")


if __name__ == "__main__":
    main()
