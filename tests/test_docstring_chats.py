"""benchmarks/docstring_chats.py: what is asked and answered, what is cut out, what is corrupted."""

import ast
import json
from pathlib import Path

import pytest

from benchmarks import docstring_chats
from lm.data import corpora, tokenizers
from lm.data.templates import CHATML_MARKERS

SOURCE = b'''"""A module \xc3\xa9."""
# A page ends here: \x0c and goes on.
class Box:
    """A class keeps its docstring."""

    def get(self, key, default=None):
        """Return the value of a key. Or else
        the default.

        More of it.
        """

        return self.values.get(key, default)

    async def wait(self, *, seconds: float = 1.0): """Wait for some time"""

def outer():
    """Return the value of a key."""
    def inner(x):
        "\xc3\xa9 Say what is inside!"
        return x
    return inner

def short():
    """Too short."""

def silent():
    return 1
'''


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "library"
    for name in ("box.py", "pack/__init__.py", "test/test_box.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(SOURCE)
    (folder / "broken.py").write_text("def (")
    (folder / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\nx = "\xe9"\n')
    for name in ("a", "b", "c"):
        lines = [
            f'def f{i}(x):\n    """Do {name} {i} times."""\n    return {i}\n' for i in range(60)
        ]
        (folder / f"{name}.py").write_text("".join(lines))
    return folder


def said(chat):
    roles = [message["role"] for message in chat["messages"]]
    assert roles == ["user", "assistant"]
    return tuple(message["content"] for message in chat["messages"])


def test_a_chat_asks_for_a_function_and_answers_with_its_first_sentence(root):
    chats, texts = docstring_chats.read(root)
    assert len(texts) == 5
    found = {name: said(chat) for name, chat in chats.items() if name.startswith("box")}
    assert found == {
        "box.Box.get": (
            "def get(self, key, default=None) in `Box` of `box`\n"
            "return self.values.get(key, default)",
            "Return the value of a key.",
        ),
        "box.Box.wait": (
            "def wait(self, *, seconds: float=1.0) in `Box` of `box`",
            "Wait for some time",
        ),
        "box.outer.inner": (
            "def inner(x) in `outer` of `box`\nreturn x",
            "é Say what is inside!",
        ),
    }
    # The answers of pack are the same, and so is that of box.outer.
    assert sum(name.startswith(("box", "pack")) for name in chats) == 3


def test_functions_lose_their_docstrings_and_nothing_else(root):
    _, texts = docstring_chats.read(root)
    (text,) = {text for text in texts if "class Box" in text}
    assert text == (
        '"""A module é."""\n# A page ends here: \x0c and goes on.\nclass Box:\n'
        '    """A class keeps its docstring."""\n\n'
        "    def get(self, key, default=None):\n        return self.values.get(key, default)\n\n"
        "    async def wait(self, *, seconds: float = 1.0): \n\n"
        "def outer():\n    def inner(x):\n        return x\n    return inner\n\n"
        "def short():\ndef silent():\n    return 1\n"
    )


def test_lines_of_windows_are_cut_in_the_right_place():
    source = SOURCE.replace(b"\n", b"\r\n")
    nodes = [node.body[0] for _, node in docstring_chats.functions(ast.parse(source), "box")]
    text = docstring_chats.without(source, nodes).decode()
    assert not any(cut in text for cut in ("Return the value", "inside", "Wait"))
    assert all(kept in text for kept in ("(key, default)\r\n", '"""A module é."""', "return x"))


def test_no_answer_is_on_two_sides_and_files_are_the_same_again(root, tmp_path):
    for name in ("one", "two"):
        docstring_chats.write(tmp_path / name, root)
    parts = {}
    for part in ("train", "reference", "held_out", "text"):
        first, second = (tmp_path / name / f"{part}.jsonl" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        parts[part] = [json.loads(line) for line in first.read_text("utf-8").splitlines()]
    parts.pop("text")
    answers = [docstring_chats.answer_of(chat) for part in parts.values() for chat in part]
    assert len(set(answers)) == len(answers) == 183
    assert len(parts["train"]) > len(parts["held_out"]) > 0 < len(parts["reference"])


def test_corrupted_chats_have_the_answers_of_each_other(root):
    chats = list(docstring_chats.read(root)[0].values())
    found = docstring_chats.corrupt(chats, 0.3, seed=1)
    assert [said(one)[0] for one in found] == [said(one)[0] for one in chats]
    assert sorted(said(one)[1] for one in found) == sorted(said(one)[1] for one in chats)
    wrong = [i for i, (one, other) in enumerate(zip(found, chats, strict=True)) if one != other]
    assert len(wrong) == round(0.3 * len(chats))
    assert found == docstring_chats.corrupt(chats, 0.3, seed=1)
    assert found != docstring_chats.corrupt(chats, 0.3, seed=2)
    assert docstring_chats.corrupt(chats, 0.0, seed=1) == chats


def test_the_markers_of_turns_are_special_tokens(tmp_path):
    texts = (corpora.read(str(Path(docstring_chats.__file__))),)
    plain = tokenizers.load("bpe", 260, texts, directory=str(tmp_path))
    marked = tokenizers.Subwords(docstring_chats.with_markers(plain.definition), "tokenizer.json")
    assert marked.special_tokens == {"<|endoftext|>", *CHATML_MARKERS}
    assert [marked.special_id(token) for token in CHATML_MARKERS] == [260, 261]
    assert (marked.vocab_size, marked.end_of_text) == (262, plain.end_of_text)
    text = f"{CHATML_MARKERS[0]} is text here"
    assert marked.decode(marked.encode(text)[0]) == text
    assert max(marked.encode(text)[0]) < 260
