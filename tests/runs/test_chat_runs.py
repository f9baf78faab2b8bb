import json
from pathlib import Path

import numpy as np
import pytest
import short_runs
import tiny
import tokenizers

from launch import page, workdir
from lm.data import corpora
from lm.data.layout import encode_document
from lm.data.tokenizers import Subwords
from lm.errors import InputError

SOURCE = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m.role + ':' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on chats: its config, its folder and the folder of its tokenizer."""
    root = tmp_path_factory.mktemp("chats")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<s>", "</s>", "<turn>"])
    built.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (root / "chat_template.jinja").write_text(SOURCE)
    pairs = [({"role": "user", "content": f"{i}?"}, "a" * i) for i in range(60)]
    lines = [
        {"messages": [question, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    (root / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tiny.config(
        data__corpus=str(root / "chats.jsonl"),
        data__tokenizer=str(root / "tokenizer.json"),
        train__steps=3,
        checkpoint__every_steps=3,
    )
    short_runs.train(config, root / "run")
    return config, root / "run", root


@pytest.mark.slow
def test_a_run_keeps_its_template_and_needs_no_other_file(run):
    _, folder, root = run
    assert (folder / "chat_template.jinja").read_text() == SOURCE
    loaded = workdir.load(str(folder)).tokenizer
    original = Subwords(Path(root / "tokenizer.json").read_text(), str(root / "tokenizer.json"))
    document = corpora.read(str(root / "chats.jsonl")).documents[7]
    positions = encode_document(document, loaded)
    np.testing.assert_array_equal(positions, encode_document(document, original))
    assert loaded.decode(positions["targets"][positions["weights"] > 0]) == "a" * 7


def test_a_page_shows_every_target_of_a_chat(run):
    _, folder, root = run
    tokenizer = workdir.load(str(folder)).tokenizer
    document = corpora.read(str(root / "chats.jsonl")).documents[3]
    parts = page.pieces(document, tokenizer)
    assert b"".join(parts) == b"<turn>user:3?</s><turn>assistant:aaa</s>"
    assert len(parts) == len(encode_document(document, tokenizer))


def test_a_run_does_not_go_on_with_another_template(run):
    config, folder, root = run
    (root / "chat_template.jinja").write_text(SOURCE.replace("':'", "'='"))
    try:
        with pytest.raises(InputError, match="holds checkpoints with chat_template="):
            short_runs.train(config, folder)
    finally:
        (root / "chat_template.jinja").write_text(SOURCE)
    record = json.loads((folder / "config.json").read_text())
    del record["chat_template"]  # As an older commit wrote it.
    (folder / "config.json").write_text(json.dumps(record))
    assert short_runs.train(config, folder)[1]
