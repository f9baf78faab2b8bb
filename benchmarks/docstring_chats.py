"""Makes chats of a library's functions and their docstrings, and text without those docstrings.

python benchmarks/docstring_chats.py --output=FOLDER [--root=FOLDER]

The user shows the signature of a function, the class and the module that it is in, and the first
line of its body; the assistant says the first sentence of its docstring. The sources are parsed,
never imported; --root is by default the standard library of the Python that runs this. Written are

    train.jsonl, reference.jsonl, held_out.jsonl    chats: 64%, 16% and 20% of them
    text.jsonl                                      the sources, a file a line

In text.jsonl no function has a docstring: a model that has read it has seen none of the answers
there. Of functions with the same answer the first one is taken. The files are the same whenever
they are made of the same sources.
"""

import argparse
import ast
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import command
from lm import strict_json
from lm.data.hashing import held_out
from lm.data.templates import CHATML_MARKERS

HELD_OUT, REFERENCE = 0.2, 0.2  # of all chats, and of those that are left
MOST_PROMPT, MOST_ANSWER = 300, 200  # characters

# Tests repeat themselves; installed packages differ between machines.
_LEFT_OUT = frozenset(("test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"))

Chat = dict[str, list[dict[str, str]]]


def write(folder: Path, root: Path) -> None:
    """Writes the four files of the sources below `root`."""
    folder.mkdir(parents=True, exist_ok=True)
    chats, texts = read(root)
    for name, part in split(chats).items():
        write_lines(folder / f"{name}.jsonl", part)
    write_lines(folder / "text.jsonl", [{"text": text} for text in texts])


def read(root: Path) -> tuple[dict[str, Chat], list[str]]:
    """Reads the sources below a folder.

    Returns:
      The chats by the qualified names of their functions, no two with the same answer; and the
      sources without the docstrings of functions, each as one text.
    """
    chats, texts = {}, []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if not _LEFT_OUT.isdisjoint(place.parts):
            continue
        source = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of the code that is parsed, not of ours.
                tree = ast.parse(source)
            source.decode()
        except (SyntaxError, ValueError):  # Not of this Python, or not UTF-8.
            continue
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        found, lines = list(functions(tree, module)), source.splitlines()
        for name, node in found:
            chat = chat_of(name, module, node, lines)
            if chat and name not in chats:
                chats[name] = chat
        texts.append(without(source, [node.body[0] for _, node in found]).decode())
    return _first_of_each(chats), texts


def functions(tree: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yields every function with a docstring, at any depth, with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        inner = f"{name}.{node.name}" if named else name
        if named and not isinstance(node, ast.ClassDef) and ast.get_docstring(node):
            yield inner, node
        yield from functions(node, inner)


def chat_of(name: str, module: str, node: ast.FunctionDef, lines: Sequence[bytes]) -> Chat | None:
    """The chat of a function; None where the prompt or the answer is too long or says nothing."""
    first = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
    answer = re.match(r".+?[.!?](?=\s|$)|.+", first)[0]
    within = name.removeprefix(f"{module}.").rpartition(".")[0]
    place = f"`{within}` of `{module}`" if within else f"`{module}`"
    prompt = f"def {node.name}({ast.unparse(node.args)}) in {place}"
    if len(node.body) > 1:
        prompt += f"\n{lines[node.body[1].lineno - 1].decode().strip()}"
    if len(prompt) > MOST_PROMPT or len(answer) > MOST_ANSWER or len(answer.split()) < 3:
        return None
    return messages(prompt, answer)


def messages(prompt: str, answer: str) -> Chat:
    """A chat of one question and one answer."""
    turns = {"user": prompt, "assistant": answer}
    return {"messages": [{"role": role, "content": said} for role, said in turns.items()]}


def without(source: bytes, nodes: Sequence[ast.stmt]) -> bytes:
    """A source without the text of some statements, nor the lines that this leaves blank."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in sorted(nodes, key=lambda node: -node.lineno):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        if not source[starts[node.lineno - 1] : begin].strip():
            begin = starts[node.lineno - 1]
            blank = re.compile(rb"[ \t]*(\r?\n[ \t]*)*(\n|$)").match(source, end)
            end = blank.end() if blank else end
        source = source[:begin] + source[end:]
    return source


def _first_of_each(chats: Mapping[str, Chat]) -> dict[str, Chat]:
    """One chat for each answer."""
    names = {}
    for name in sorted(chats):
        names.setdefault(answer_of(chats[name]), name)
    return {name: chats[name] for name in sorted(names.values())}


def answer_of(chat: Chat) -> str:
    """What the assistant says."""
    return chat["messages"][-1]["content"]


def split(chats: Mapping[str, Chat]) -> dict[str, list[Chat]]:
    """The chats of each part, by hashes of the qualified names."""
    parts = {"train": [], "reference": [], "held_out": []}
    for name, chat in chats.items():
        if held_out(name.encode(), HELD_OUT):
            parts["held_out"].append(chat)
        elif held_out(f"reference {name}".encode(), REFERENCE):
            parts["reference"].append(chat)
        else:
            parts["train"].append(chat)
    return parts


def corrupt(chats: Sequence[Chat], share: float, seed: int) -> list[Chat]:
    """The same chats, a share of them with the answer of another one of this share.

    Which ones is drawn from the seed; each of the wrong answers is used once, and none is that of
    its own chat.
    """
    chosen = random.Random(seed).sample(range(len(chats)), round(share * len(chats)))
    found = list(chats)
    for one, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        question = chats[one]["messages"][0]["content"]
        found[one] = messages(question, answer_of(chats[other]))
    return found


def with_markers(definition: str) -> str:
    """A tokenizer.json in which the texts around a turn of a chat are special tokens, too."""
    found = json.loads(definition)
    like = found["added_tokens"][0]
    size = len({*found["model"]["vocab"], *(token["content"] for token in found["added_tokens"])})
    for number, token in enumerate(CHATML_MARKERS, size):
        found["added_tokens"].append(like | {"id": number, "content": token})
    return strict_json.dumps(found)


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file of JSON lines."""
    command.write_text(path, "".join(f"{strict_json.dumps(one)}\n" for one in records))


def standard_library() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=standard_library())
    options = parser.parse_args()
    write(options.output, options.root)


if __name__ == "__main__":
    main()
