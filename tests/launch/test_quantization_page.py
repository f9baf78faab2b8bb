"""The page about a quantized model: its sentences, its numbers, and the page in a browser."""

import html
import html.parser
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest

from launch import document
from launch.document import Details, Figure, Gallery, Paragraph, Table
from launch.quantization_page import Run, quantization_page, recovered, sentence
from lm.compression.after_training import round_to_nearest_model
from lm.compression.phases import default_rules
from lm.compression.report import describe
from lm.errors import InputError
from objectives.quantization import absmax

HOSTILE = "m</title><script>alert(1)</script>\"'&`"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
EMPTY = {"br", "img", "meta", "link", "input", "hr"}


def run(method, after, bits=4, before=2.0, group=32, **more):
    fields = {
        "bits_per_byte": 0.5 * after,
        "file_bytes": 1000 * bits,
        "bits_per_weight": bits + 0.5,
    }
    kind = "group" if group else "channel"
    return Run(method, bits, "absmax", kind, group, before, after, **(fields | more))


RUNS = (
    run("gptq", 2.04, seconds=1234.56),
    run("rtn", 2.1),
    run("rtn", 2.9, 2),
    run("gptq", 2.45, 2),
    run("rsq", 2.36, 2),
    run("gptq", 2.001, 8, group=0),
)


@pytest.fixture(scope="module")
def description():
    return describe(*quantized(3))


def quantized(bits):
    rng = np.random.default_rng(0)
    params = {
        "embedding": {"table": jnp.asarray(rng.normal(size=(9, 8)), jnp.float32)},
        "layers": {
            "mlp": {
                "up": jnp.asarray(rng.normal(size=(30, 8, 4)), jnp.float32),
                "down": jnp.asarray(rng.standard_t(3, size=(30, 4, 8)), jnp.float32),
            },
            "mlp_norm": {"scale": jnp.ones((30, 8))},
        },
    }
    return params, round_to_nearest_model(params, default_rules(bits, absmax))


class Parsed(html.parser.HTMLParser):
    """Tables, paragraphs and elements of a page, of which every tag has to be closed."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.tables, self.text = [], {}
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("p", "li", "title", "h1", "figcaption"):
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, content):
        tag = next((t for t in reversed(self.open) if t not in ("code", "span")), None)
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] += content
        elif tag in self.text:
            self.text[tag][-1] += content


def svgs(content):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", content, re.DOTALL)]


def test_recovered_is_the_share_of_the_loss_of_rounding():
    shares = [recovered(one, RUNS) for one in RUNS]
    np.testing.assert_allclose([shares[i] for i in (0, 3, 4)], [0.6, 0.5, 0.6])
    # Rounding itself, and a run of which nothing was rounded with the same scales.
    assert [shares[i] for i in (1, 2, 5)] == [None] * 3
    assert recovered(run("gptq", 2.04, group=64), RUNS) is None
    assert recovered(run("gptq", 2.04, before=1.9), RUNS) is None
    assert recovered(run("gptq", 2.04), [run("rtn", 2.0)]) is None
    assert recovered(run("gptq", math.nan), RUNS) is None


def test_the_sentence_says_what_is_lost():
    assert sentence(RUNS[0], RUNS) == (
        "gptq with 4 bits, absmax in groups of 32, adds 0.0400 nats a token: 2.0000 before, 2.0400 "
        "after. It recovers 60% of the loss that rounding to nearest adds."
    )
    assert sentence(RUNS[1], RUNS) == (
        "rtn with 4 bits, absmax in groups of 32, adds 0.1000 nats a token: 2.0000 before, 2.1000 "
        "after."
    )
    assert "takes off 0.0100 nats" in sentence(run("gptq", 1.99), ())
    assert "That is 50% more than rounding" in sentence(run("gptq", 2.15), RUNS)
    assert sentence(run("gptq", math.nan), RUNS).endswith("the loss is not finite.")
    assert "a scale for each channel" in sentence(RUNS[5], RUNS)


def test_the_page_has_the_numbers(description):
    content = quantization_page("smol", description, RUNS)
    seen = Parsed(content)
    assert seen.text["title"][0] == seen.text["h1"][0] == "Quantization of smol"
    assert seen.text["p"][0] == sentence(RUNS[0], RUNS)
    assert seen.text["li"] == [
        "2 bits: rsq (absmax in groups of 32) adds the least of 3 runs, +0.3600 nats and recovers "
        "60%",
        "4 bits: gptq (absmax in groups of 32) adds the least of 2 runs, +0.0400 nats and recovers "
        "60%",
    ]
    table, numbers, sizes = seen.tables
    assert len(table) == 1 + len(RUNS)
    first = ["gptq", "4", "absmax", "group of 32", "2.0000", "2.0400", "+0.0400", "60%", "1.0200"]
    assert table[1] == [*first, "4,000", "4.50", "1,234.6"]
    assert table[2][7] == table[2][-1] == ""
    assert len(numbers) == 1 + 1 + 30 + 30
    matrices = {matrix.path: matrix for matrix in description.matrices}
    layer = matrices["layers/mlp/down"].layers[17]
    (line,) = [row for row in numbers if row[:2] == ["mlp/down", "17"]]
    shown = [f"{layer.error:.4g}", f"{layer.outermost:.2%}", f"{layer.outlier:.1f}"]
    assert line[2:7] == ["3", *shown, str(layer.beyond)]
    assert line[7:9] == ["12", "32"]
    whole = 12 * 60 + 36  # 3 bits of 32 weights, 4 bits of 72
    scales = 4 * (30 * 4 + 30 * 8 + 9)
    assert sizes[-1][:7] == ["all", "2,232", "8,928", f"{whole}", f"{scales:,}", "0", "960"]
    assert sizes[-1][7] == f"{whole + scales + 960:,}"
    assert [row[0] for row in sizes[1:]] == ["matrices of the layers", "embedding", "others", "all"]
    notes = [e.text for svg in svgs(content) for e in svg.iter("title")]
    assert f"mlp/down of layer 17: error {layer.error:.3g}" in notes
    assert "rtn with 2 bits: +0.9000 nats, 2.50 bits a weight" in notes


def test_the_page_needs_nothing_else_and_is_the_same_again(description):
    content = quantization_page("smol", description, RUNS)
    seen = Parsed(content)
    assert not {"script", "img", "link", "iframe"} & set(seen.tags)
    assert "://" not in content
    assert "url(" not in content
    assert not {"src", "href"} & {name for name, _ in seen.attributes}
    found = svgs(content)
    assert len(found) == 2 + 2 * 3
    for svg in found:
        assert svg.get("role") == "img"
        assert svg.get("aria-label")
        assert not re.search(
            r"nan|inf\b", " ".join(v for e in svg.iter() for v in e.attrib.values())
        )
    assert quantization_page("smol", description, RUNS) == content


def test_names_are_text(description):
    runs = [one._replace(method=HOSTILE, quantizer=HOSTILE) for one in RUNS]
    matrices = [matrix._replace(path=HOSTILE) for matrix in description.matrices]
    content = quantization_page(HOSTILE, description._replace(matrices=tuple(matrices)), runs)
    seen = Parsed(content)
    assert "script" not in seen.tags
    assert seen.text["title"][0] == f"Quantization of {HOSTILE}"
    assert seen.tables[0][1][0] == HOSTILE
    assert svgs(content)


def test_one_run_has_no_plot_and_no_quantized_matrix_no_map(description):
    content = quantization_page("x", description, RUNS[:1])
    assert "logarithmic" not in content.split("Error by matrix")[0]
    assert "<li>" not in content
    assert len(svgs(content)) == len(svgs(quantization_page("x", description, RUNS))) - 1
    nothing = describe(*quantized(16))
    content = quantization_page("x", nothing, [run("rtn", math.inf)])
    assert svgs(content) == []
    assert Parsed(content).tables[-1][-1][-1] == "100.0%"
    with pytest.raises(InputError, match="no run"):
        quantization_page("x", description, [])


def test_layers_of_different_widths_are_shown_by_width(description):
    wide = describe(*quantized(5))
    mixed = [
        a._replace(layers=a.layers[:15] + b.layers[15:])
        for a, b in zip(description.matrices, wide.matrices, strict=True)
    ]
    seen = Parsed(quantization_page("x", description._replace(matrices=tuple(mixed)), RUNS))
    assert any("layers/mlp/up: 3 and 5 bits" in text for text in seen.text["figcaption"])
    assert {row[2] for row in seen.tables[1][2:]} >= {"3", "5"}


def test_blocks_within_blocks_in_both_formats():
    figures = Gallery([Figure("<svg></svg>", "one"), Figure("<svg></svg>", "two")])
    blocks = [figures, Details("more", [Table(["x", "y"], [["a", "1"]]), Paragraph("end")])]
    text = document.markdown(blocks, "t")
    assert "one" in text
    assert "more\n\n| x | y |" in text
    seen = Parsed(document.page(blocks, "t"))
    assert seen.text["figcaption"] == ["one", "two"]
    assert seen.tables == [[["x", "y"], ["a", "1"]]]
    assert seen.tags.index("details") < seen.tags.index("summary") < seen.tags.index("table")


PROBE = """<script>
const style = (q) => getComputedStyle(document.querySelector(q));
const cells = [...document.querySelectorAll(".cell")];
document.querySelector("summary").click();
const height = (e) => e.getBoundingClientRect().height;
const text = [...document.querySelectorAll("svg text")].map(height);
document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
  ink: style(".plot text:not(.quiet)").fill,
  body: style("body").color, paper: style("body").backgroundColor,
  fills: new Set(cells.map((e) => getComputedStyle(e).fill)).size, smallest: Math.min(...text),
  opened: height(document.querySelector("details table")),
  columns: style(".gallery").gridTemplateColumns.split(" ").length,
});
</script>"""


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser here")
def test_a_browser_shows_it_on_a_phone_in_both_colours(description, tmp_path):
    content = quantization_page("smol", description, RUNS).replace("</body>", f"{PROBE}</body>")
    # A window cannot be as narrow as a phone: a frame can.
    frame = f'<iframe style="width:400px;height:800px" srcdoc="{html.escape(content)}"></iframe>'
    watch = "<script>onload = () => { document.title = frames[0].document.title; };</script>"
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{frame}{watch}</body>")
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    seen = {}
    for scheme, colour in ((0, "dark"), (1, "light")):
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--user-data-dir={tmp_path / colour}",
                "--dump-dom",
                (tmp_path / "page.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
        seen[colour] = json.loads(html.unescape(title))
    for one in seen.values():
        assert one["wide"] <= one["room"] <= 400
        assert one["ink"] == one["body"] != one["paper"]
        assert one["fills"] > 20
        assert one["smallest"] > 7
        assert one["opened"] > 100
        assert one["columns"] == 2
    assert seen["dark"]["paper"] != seen["light"]["paper"]
