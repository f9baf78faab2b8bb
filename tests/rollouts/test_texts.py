"""The file of a model's samples: what is gone on with, and what is left alone."""

import pytest

from lm.errors import InputError
from lm.rollouts.texts import line_of, written

SETTINGS = {"model": "runs/a", "seed": 0, "temperature": 0.8}


def test_whole_lines_count_and_a_cut_one_is_taken_away(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert written(path, SETTINGS) == 0
    lines = [line_of(text, number, SETTINGS) for number, text in enumerate(("a\n", "", "ü"))]
    path.write_text("".join(lines[:2]) + lines[2][:9])
    assert written(path, SETTINGS) == 2
    assert path.read_text() == "".join(lines[:2])


@pytest.mark.parametrize(
    "content",
    [
        "what somebody wrote\n",
        "what somebody wrote",
        '{"text": "one record without a line break"}',
        line_of("a", 0, SETTINGS)[:-1],
        line_of("a", 1, SETTINGS),
        line_of("a", 0, SETTINGS | {"seed": 1}),
        "[" * 10_000 + "\n",
    ],
    ids=lambda content: content[:24].strip(),
)
def test_another_file_is_refused_and_stays_as_it_is(content, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"samples\.jsonl:1 was not drawn by this command"):
        written(path, SETTINGS)
    assert path.read_text() == content
