"""Templates that are hostile, incomplete or without special tokens, and where they are found."""

import time

import pytest
from test_chats import CHAT, chat, save

from lm.data import chats, templates
from lm.data.chats import Message, make_template
from lm.data.layout import encode_document
from lm.data.tokenizers import Bytes
from lm.errors import InputError

HOSTILE = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "too long",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{% for i in range(10**9) %}{% endfor %}": "[Rr]ange",
    "{{ ().__class__.__mro__ }}": "unsafe",
    "{{ self.__init__.__globals__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ raise_exception('not\nthis') }}": "not this",
    "{% include 'x' %}": "loader",
    "{{ pad_token }}": "pad_token",
    "{% if %}": "cannot be read",
    "{{ 'x' * 10**9 }}": "too much",
    "{{ 'x'.ljust(10**9) }}": "too much",
    "{{ 'a'|replace('a', 'b' * 9999999)|replace('b', 'c' * 99) }}": "too much",
    "{{ '{:999999999}'.format(1) }}": "format",
    "{{ '%999999999d' % 1 }}": "%",
    "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}": "too much",
    **{
        f"{{% set n = namespace(x='ab') %}}{{% for i in range(90) %}}{double}{{% endfor %}}": "much"
        for double in (
            "{% set n.x = n.x ~ n.x %}",
            "{% set n.x = n.x + n.x %}",
            "{% set n.x = [n.x, n.x] %}",
            "{% set n.x = {'a': n.x, 'b': n.x} %}",
            "{% set n.x = namespace(a=n.x, b=n.x) %}",
            "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}",
        )
    },
}


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_is_refused_in_one_line(source, monkeypatch):
    monkeypatch.setattr(templates, "_MOST_ROUNDS", 20_000)
    start = time.monotonic()
    with pytest.raises(InputError, match=HOSTILE[source]) as caught:
        chats.spans(make_template(source, {}), [Message("assistant", "x")], (), "a.jsonl:1")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20


def test_templates_have_the_helpers_that_they_expect():
    source = (
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') }}{% for m in messages %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content ~ 1 }}{% endfor %}"
    )
    messages = [Message("user", "x"), Message("assistant", "y")]
    assert make_template(source, {}).render(messages) == '{"a": "<é>"}2024x1'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # It trains on nothing but what is clear.
        ("{% for m in messages %}{{ m.content | length }}<e>{% endfor %}", "cannot be found"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}<e>{% endfor %}",
            "changes the text of the messages before it",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}"
            "{{ '<e>' if loop.last and m.role == 'assistant' else '<u>' }}{% endfor %}",
            "is written in another way when more messages follow",
        ),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_mask_that_cannot_be_known_is_refused(source, message):
    template = make_template(source, {})
    messages = [Message(*m) for m in CHAT]
    with pytest.raises(InputError, match=rf"^a.jsonl:7: chat template: .*{message}"):
        chats.spans(template, messages, {"<e>", "<u>"}, "a.jsonl:7")


def test_a_turn_that_no_special_token_ends_is_trained_on_as_a_whole():
    source = "{% for m in messages %}{{ '<e>' ~ m.role ~ ': ' ~ m.content }}\n{% endfor %}"
    spans = chats.spans(make_template(source, {}), [Message(*m) for m in CHAT], {"<e>"}, "d")
    assert [text for text, weight in spans if weight] == ["four\n", "  five is 3 + 2  \n"]


def test_without_markers_as_special_tokens_chatml_is_ordinary_text():
    document = chat(("user", "a"), ("assistant", "<|im_end|>b"))
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<|im_end|>b<|im_end|>\n"
    positions = encode_document(document, Bytes())
    assert positions["tokens"][0] == positions["targets"][-1] == Bytes.end_of_text
    assert Bytes().decode(positions["targets"]) == text
    assert Bytes().decode(positions["targets"][positions["weights"] > 0]) == "<|im_end|>b<|im_end|>"
    assert positions["num_bytes"].sum() == len(text)


def test_the_template_is_found_beside_the_tokenizer(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    cases = {
        "jinja": save(tmp_path / "a", "j", {"chat_template": "c"}),
        "config": save(tmp_path / "b", None, {"chat_template": "c"}),
        "list": save(tmp_path / "c", None, {"chat_template": named}),
        "none": save(tmp_path / "d"),
    }
    found = {name: tokenizer.chat_template for name, tokenizer in cases.items()}
    assert found == {"jinja": "j", "config": "c", "list": "d", "none": None}
    assert len({tokenizer.fingerprint for tokenizer in cases.values()}) == 1
    (tmp_path / "d" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja: no chat template"):
        save(tmp_path / "d")
