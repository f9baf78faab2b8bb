"""The page of preference records: its numbers, and the page as a browser has it."""

import html
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
import tiny
from test_inspect import BROWSERS, Parsed

from launch import page, pair_page
from lm.data import tokenizers
from lm.data.preferences import read_preference
from lm.errors import InputError
from lm.references.pair_inspection import inspect_pairs
from lm.training import experiment, make_objective

TOKENIZER = tokenizers.Bytes()
RECORDS = (
    {"prompt": "2 + 2 = <", "chosen": "4", "rejected": "five </pre>"},
    {"prompt": "a ", "chosen": "colour", "rejected": "color"},
    {"prompt": "the same ", "chosen": "x", "rejected": "x"},
)
DOCUMENTS = [read_preference(one, f"file:{i}", f"file:{i}") for i, one in enumerate(RECORDS, 1)]
BETA = 0.3


@pytest.fixture(scope="module")
def run():
    config = tiny.config(
        train__ema_decay=0.9,
        train__batch_size=2,
        mesh__data=1,
        data__sequence_length=64,
        data__packing="best_fit",
        objective__name="dpo",
        objective__dpo__beta=BETA,
        objective__references__reference_nll="ema",
    )
    return experiment.build(config, TOKENIZER.vocab_size, jax.devices()[:1])


def look(run, documents=DOCUMENTS):
    """With a moving average that is another model, as after training."""
    state = jax.jit(run.init)(jax.random.key(0))
    state = state._replace(ema=jax.jit(run.init)(jax.random.key(1)).trained)
    reading = make_objective.preference_reading(run.config, run.objective)
    return inspect_pairs(run, state, documents, TOKENIZER, reading)


@pytest.fixture(scope="module")
def found(run):
    return look(run)


def rendered(found):
    return pair_page.render(found, TOKENIZER, page.Heading("a<b>", "run", 7, "dpo(beta=0.3)"))


def test_the_page_has_both_answers_of_the_records_that_can_be_used(found):
    seen = Parsed(rendered(found))
    expected = [one["prompt"] + one[side] for one in RECORDS[:2] for side in ("chosen", "rejected")]
    assert seen.texts == expected
    assert len(seen.tokens) == sum(len(text) + 1 for text in expected)
    assert not {"src", "href", "onclick", "onerror"} & set(seen.attributes)
    assert all(len(c["values"]) == len(seen.tokens) for c in seen.numbers["columns"])


def test_pulls_and_rewards_are_those_of_the_paper(found):
    """d of -log sigmoid(beta (u_w - u_l)) in log p: beta sigmoid(-h) up, and as much down."""
    live = found.batch["weights"] != 0
    sides = found.batch["sides"]
    for r in range(2):
        chosen, rejected = (found.log_ratio[r][live[r] & (sides[r] == s)].sum() for s in (1, -1))
        margin = BETA * (float(chosen) - float(rejected))
        strength = BETA / (1 + np.exp(margin))
        np.testing.assert_allclose(
            found.pull[r], np.where(live[r], sides[r] * strength, 0), atol=1e-6
        )
        np.testing.assert_allclose(found.terms["margin"][r], margin, rtol=1e-4)
        np.testing.assert_allclose(found.terms["loss"][r], np.log1p(np.exp(-margin)), rtol=1e-5)
    assert abs(found.log_ratio[live]).max() > 0
    np.testing.assert_allclose(found.metrics["loss"], found.terms["loss"].mean(), rtol=1e-5)


def test_a_labelled_answer_has_its_reward(run):
    records = ({"prompt": "2 + 2 = ", "completion": x, "label": x == "4"} for x in ("4", "five"))
    documents = [read_preference(one, f"file:{i}", f"file:{i}") for i, one in enumerate(records)]
    config = run.config.copy_and_resolve_references()
    config.objective.name = "npo"
    found = look(
        run._replace(config=config, objective=make_objective.make_objective(config)), documents
    )
    parts = re.findall(r"<h3>(.*?)</h3>.*?<p>(.*?)</p>", rendered(found), re.DOTALL)
    for r, (name, said) in enumerate(parts):
        assert name == ("chosen, label true", "rejected, label false")[r]
        total = found.log_ratio[r][found.batch["weights"][r] != 0].sum()
        assert said.endswith(f"reward {config.objective.npo.beta * total:+.3f}")
        assert abs(total) > 0.01
    assert len(parts) == 2


def test_records_that_cannot_be_used_are_one_line(run):
    with pytest.raises(InputError, match=r"none of the records: 1 with two equal answers$"):
        look(run, DOCUMENTS[2:])
    # Alone it has no answer under another prompt, which KTO needs.
    config = run.config.copy_and_resolve_references()
    config.objective.name = "kto"
    kto = run._replace(config=config, objective=make_objective.make_objective(config))
    with pytest.raises(InputError, match="none of the records: 1 without a later record that has"):
        look(kto, DOCUMENTS[:1])


PROBE = """<script>
const token = [...document.querySelectorAll("pre span:not(.prompt)")].at(-1);
const look = (e) => getComputedStyle(e).backgroundColor;
token.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
const told = document.querySelector("#panel").innerText, before = look(token);
document.querySelector("input[value=ratio]").click();
const columns = getComputedStyle(document.querySelector(".answers")).gridTemplateColumns;
document.title = JSON.stringify({told, before, after: look(token), columns});
</script>"""


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser here")
def test_a_browser_shows_the_answers_side_by_side(found, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    (tmp_path / "page.html").write_text(rendered(found).replace("</body>", f"{PROBE}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,800"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [browser, *options, profile, "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert len([width for width in seen["columns"].split() if width != "0px"]) == 2
    assert "pull -" in seen["told"]
    assert "log-ratio" in seen["told"]
    assert seen["before"] != seen["after"]
