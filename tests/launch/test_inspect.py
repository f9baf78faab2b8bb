"""The page of token weights: its text, its numbers, and the page as a browser has it."""

import functools
import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from launch import page
from lm.data import corpora, tokenizers
from lm.data.documents import Document
from lm.errors import InputError
from lm.model.interface import Tokens
from lm.references import inspection
from lm.training import experiment, make_objective

ROOT = Path(__file__).parent.parent.parent
TEXT = 'if a < b:\n\treturn "é – 日本"  # <script>alert(1)</script> & </pre>\n' * 2
DOCUMENTS = (
    Document("plain <b>", ((TEXT, 1.0),)),
    Document("answer", (("2 + 2 = ", 0.0), ("4, of course", 1.0))),
)
TOKENIZER = tokenizers.Bytes()
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


class Parsed(html.parser.HTMLParser):
    """Tokens, text and elements of a page."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.attributes, self.tokens, self.texts = [], [], [], []
        self.open, self.data = [], ""
        self.feed(content)
        self.numbers = json.loads(self.data)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        self.open.append((tag, dict(attributes)))
        if tag == "pre":
            self.texts.append("")
        elif tag == "span" and ("pre", {}) in self.open:
            self.tokens.append(dict(attributes))

    def handle_endtag(self, tag):
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, content):
        tags = [tag for tag, _ in self.open]
        if "pre" in tags and "b" not in tags:
            self.texts[-1] += content
        if self.open and self.open[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += content

    def column(self, label):
        (values,) = [c["values"] for c in self.numbers["columns"] if c["label"] == label]
        return np.array(values, float)


@pytest.fixture(scope="module")
def run():
    config = tiny.config(
        train__ema_decay=0.9,
        train__batch_size=2,
        mesh__data=1,
        objective__references__reference_nll="ema",
    )
    return experiment.build(config, TOKENIZER.vocab_size, jax.devices()[:1])


@pytest.fixture(scope="module")
def state(run):
    """As after training: the moving average is another model."""
    state = jax.jit(run.init)(jax.random.key(0))
    return state._replace(ema=jax.jit(run.init)(jax.random.key(1)).trained)


def objective(run, name, **hyper):
    config = run.config.copy_and_resolve_references()
    config.objective.weighting = name
    config.objective[name].update(hyper)
    return make_objective.make_objective(config)


def inspected(run, state, name="uniform", documents=DOCUMENTS, **hyper):
    if hyper:
        run = run._replace(objective=objective(run, name, **hyper))
    return inspection.inspect(run, state, documents, TOKENIZER)


def parsed(found, documents=DOCUMENTS):
    heading = page.Heading("a<b>.txt", "run", 7, "uniform()")
    return Parsed(page.render(found, documents, TOKENIZER, heading))


@pytest.fixture(scope="module")
def rho1(run, state):
    return inspected(run, state, "rho1", keep=0.3)


def dense(run, params, text, length=32):
    """Losses and entropies of a text, window by window, from logits in float64."""
    ids = [256, *text.encode(), 256]
    losses, entropies = [], []
    for start in range(0, len(ids) - 1, length):
        window = np.array(ids[start : start + length + 1])
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(window) - 1] = window[:-1]
        hidden, head = _forward(run.model, params, tokens)
        logits = np.asarray(hidden[0, : len(window) - 1], np.float64) @ np.asarray(head, np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += list(-logits[np.arange(len(logits)), window[1:]])
        entropies += list(-(np.exp(logits) * logits).sum(-1))
    return np.array(losses), np.array(entropies)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens):
    """One segment; what stands after the window is later than all of it."""
    positions = jnp.arange(tokens.shape[1])[None]
    inputs = Tokens(tokens, positions, jnp.ones_like(tokens))
    return model.apply(params, inputs).hidden, model.head(params)


def test_the_page_has_every_token_and_its_text_is_the_text(rho1):
    seen = parsed(rho1)
    assert seen.texts == [document.text for document in DOCUMENTS]
    assert len(seen.tokens) == len(TEXT.encode()) + 1 + len(DOCUMENTS[1].text) + 1
    assert all(len(c["values"]) == len(seen.tokens) for c in seen.numbers["columns"])
    assert seen.tags.count("script") == 2
    assert seen.tags.count("pre") == 2
    assert not {"src", "href", "onclick", "onerror"} & set(seen.attributes)
    content = page.render(rho1, DOCUMENTS, TOKENIZER, page.Heading("a<b>", "r", 1, "x"))
    assert "://" not in content
    assert "a&lt;b&gt;" in content
    assert "plain &lt;b&gt;" in content


def test_the_numbers_are_those_of_an_independent_computation(run, state, rho1):
    """The best 30% of the whole text, losses over the moving average's; and not of each window."""
    answer = DOCUMENTS[1]
    seen = parsed(rho1)
    parts = [dense(run, state.trained.params, d.text) for d in DOCUMENTS]
    losses, entropies = (np.concatenate(x) for x in zip(*parts, strict=True))
    average = np.concatenate([dense(run, state.ema.params, d.text)[0] for d in DOCUMENTS])
    np.testing.assert_allclose(seen.column("loss"), losses, rtol=1e-4)
    np.testing.assert_allclose(seen.column("probability"), np.exp(-losses), rtol=1e-3)
    np.testing.assert_allclose(seen.column("entropy"), entropies, rtol=1e-4)
    np.testing.assert_allclose(seen.column("reference_nll"), average, rtol=1e-4)

    prompt = np.zeros(len(losses), bool)
    prompt[len(TEXT.encode()) + 1 :][: len(answer.spans[0][0])] = True
    np.testing.assert_array_equal(seen.numbers["prompt"], prompt)
    assert [token.get("class") == "prompt" for token in seen.tokens] == prompt.tolist()

    def best(excess, live):
        kept = -(-live.sum() * 3 // 10)
        return live & (excess >= np.sort(excess[live])[-kept])

    expected = best(losses - average, ~prompt)
    np.testing.assert_array_equal(seen.column("weight"), expected)
    alone = [best((losses - average)[i : i + 32], ~prompt[i : i + 32]) for i in range(0, 128, 32)]
    assert (np.concatenate(alone) != expected[:128]).any()
    figures = rho1.metrics
    np.testing.assert_allclose(figures["mean_loss"], losses[~prompt].mean(), rtol=1e-5)
    np.testing.assert_allclose(figures["loss"], losses[expected].mean(), rtol=1e-5)
    np.testing.assert_allclose(figures["effective_sample_size"], expected.sum(), rtol=1e-6)


def test_colours_follow_the_numbers(run, state):
    found = inspected(run, state, "dft", exponent=1.0)
    seen = parsed(found)
    shades = np.array(
        [re.fullmatch(r"--w:(.*);--l:(.*)", t["style"]).groups() for t in seen.tokens], float
    )
    live = np.array(seen.numbers["prompt"]) == 0
    np.testing.assert_allclose(
        seen.column("weight"), np.where(live, np.exp(-seen.column("loss")), 0), rtol=1e-4
    )
    for shade, name in zip(shades.T, ("weight", "loss"), strict=True):
        values = seen.column(name)
        brightest = np.percentile(values[live], 99)
        np.testing.assert_allclose(shade, np.minimum(values / brightest, 1), rtol=6e-3, atol=1e-6)


def test_what_is_not_finite_is_marked_and_the_page_still_made(rho1):
    weights = rho1.weights.copy()
    weights[0, 3] = np.nan
    seen = parsed(rho1._replace(weights=weights))
    assert [i for i, token in enumerate(seen.tokens) if token.get("class") == "bad"] == [3]
    assert seen.numbers["columns"][0]["values"][3] == "nan"


def test_attention_of_a_prompt_is_a_reference(run, state):
    found = inspected(run, state, "ss_token", gamma=0.0, keep=0.5)
    seen = parsed(found)
    attention = seen.column("attention_to")
    assert ((attention > 0) & (attention <= 1 + 1e-6)).all()
    # While a window has only its prompt, all attention goes there.
    np.testing.assert_allclose(attention[0], 1, rtol=1e-6)
    assert attention[31] < 0.5


def test_texts_without_a_target_are_refused(run, state):
    with pytest.raises(InputError, match="nothing to weigh"):
        inspected(run, state, documents=(Document("x", (("prompt", 0.0),)),))


def test_a_character_in_pieces_stands_where_it_is_complete(run, state):
    documents = (Document("x", (("aé\r", 1.0),)),)
    assert page.pieces(documents[0], TOKENIZER) == [b"a", b"\xc3", b"\xa9", b"\r", b""]
    found = inspected(run, state, documents=documents)
    content = page.render(found, documents, TOKENIZER, page.Heading("x", "r", 1, "uniform"))
    marks = re.findall(r"<span[^>]*>(.*?)</span>", content.split("<pre>")[1].split("</pre>")[0])
    assert marks == [
        "a",
        '<i class="raw" data-c="C3"></i>',
        "é",
        '<i data-c="␍"></i>',
        '<i class="raw" data-c="end"></i>',
    ]


def test_files_and_folders_are_read_whole(tmp_path):
    tiny.write_corpus(tmp_path / "folder", documents=5)
    lines = ['{"prompt": "p", "response": "r"}', '{"text": "t"}'] * 3
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    assert len(corpora.read(str(tmp_path / "folder")).documents) == 5
    read = corpora.read(str(tmp_path / "x.jsonl"))
    assert [d.text for d in read.documents] == ["pr", "t"] * 3
    assert corpora.read(str(tmp_path / "x.txt")).documents[0].text == "caf�"


PROBE = """<script>
const hovered = document.querySelectorAll("pre span")[3];
const look = (e) => getComputedStyle(e).backgroundColor;
const before = look(hovered);
hovered.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
const told = document.querySelector("#panel").innerText;
document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
const next = document.querySelector("#panel").innerText;
document.querySelector("input[value=loss]").click();
document.title = JSON.stringify({
  told, next, before, after: look(hovered), wide: document.documentElement.scrollWidth,
  ramp: getComputedStyle(document.querySelector(".scale.of-loss")).display,
});
</script>"""


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser here")
def test_a_browser_shows_the_numbers_of_a_token_and_changes_colours(rho1, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    heading = page.Heading("text", "run", 7, "rho1")
    content = page.render(rho1, DOCUMENTS, TOKENIZER, heading)
    (tmp_path / "page.html").write_text(content.replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=390,800",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    numbers = parsed(rho1)
    loss = float(f"{numbers.column('loss')[3]:.4g}")
    assert f"loss {loss:g}" in seen["told"]
    assert "token 4 of" in seen["told"]
    assert "token 5 of" in seen["next"]
    assert seen["before"] != seen["after"]
    assert seen["ramp"] != "none"
    assert seen["wide"] <= 500  # Some browsers' windows cannot be narrower.
