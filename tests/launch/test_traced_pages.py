"""A page of results is traced to its runs, and made from a question."""

import re
import shutil
from pathlib import Path

import pytest
from test_result_pages import FOLDER, ROOT

from launch import records, result_pages, result_tables, results
from lm.errors import InputError

QUESTION = """# Does a language model need a trained input table?

At this size, yes: a model without it is ${codes/binary|worse}.

${plot codes:}

${codes}

## How to run it

${commands}
"""


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """docs/results with the study of codes alone, and a page of it."""
    folder = tmp_path / FOLDER
    (folder / "questions").mkdir(parents=True)
    for name in ("codes.csv", "codes.jsonl.gz"):
        shutil.copy(ROOT / FOLDER / name, folder / name)
    (folder / "questions" / "1_codes.md").write_text(QUESTION)
    monkeypatch.chdir(tmp_path)
    return folder


def write(folder):
    for name, text in result_pages.build(FOLDER).items():
        (folder.parent / name).write_text(text)


@pytest.mark.parametrize("page", ["docs/results.md", "docs/results/codes.md"])
def test_a_page_is_traced_to_its_runs(copied, capsys, page):
    write(copied)
    results.trace_page(Path(page))
    shown = capsys.readouterr().out
    assert "Does a language model need a trained input table?" in shown
    rows = records.read_csv(copied / "codes.csv")
    scores = {(row.variant, row.seed): row.bits_per_byte for row in rows}
    for seed in range(3):
        difference = scores["binary", seed] - scores["learned", seed]
        assert f"{difference:+.4f} (seed {seed})" in shown
    assert "all 21 runs are those of docs/results/codes.jsonl.gz" in shown
    assert "as made from these tables" in shown


@pytest.mark.parametrize("changed", ["codes.md", "codes.svg", "../results.md", "codes.csv"])
def test_a_page_that_is_not_that_of_the_runs_is_found(copied, capsys, changed):
    write(copied)
    path = copied / changed
    if changed == "codes.csv":
        rows = records.read_csv(path)
        changed_row = rows[0]._replace(bits_per_byte=rows[0].bits_per_byte + 1e-9)
        records.write_csv(path, [changed_row, *rows[1:]])
    else:
        path.write_text(path.read_text().replace("0.1834", "0.1835"))
    with pytest.raises(SystemExit) as stopped:
        results.trace_page(Path("docs/results.md"))
    assert stopped.value.code == 1
    named = {
        "../results.md": "docs/results.md: not that of",
        "codes.csv": r"learned/seed_0/metrics.jsonl: bits_per_byte is 1.8",
    }
    assert named.get(changed, f"docs/results/{changed}: not that of") in capsys.readouterr().out


def test_only_pages_of_results_are_traced_as_pages(copied):
    write(copied)
    with pytest.raises(InputError, match=r"no page of results; valid: docs/results.md"):
        results.trace_page(Path("docs/index.md"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("binary|worse", "binary|better"), r"1_codes.md: .*says worse"),
        (lambda text: text.replace("${codes}", "${coeds}"), "no table coeds; valid: codes"),
        (lambda text: text.replace("# Does", "Does"), "begin with '# QUESTION' and an answer"),
        (lambda text: text.replace("|worse", ":.2f"), "begin with '# QUESTION' and an answer"),
        (lambda text: text.replace("${plot codes:}", ""), "0 plots, not one"),
        (lambda text: text.replace("plot codes:", "plot coeds:"), "the plot's coeds is no STUDY"),
        (lambda text: text.replace("${codes}", ""), r"codes\.csv is on no page"),
    ],
    ids=["verdict", "table", "question", "answer", "plot", "panel", "hidden"],
)
def test_a_source_that_does_not_fit_is_refused(copied, change, message):
    path = copied / "questions" / "1_codes.md"
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=message):
        result_pages.build(FOLDER)


def test_the_question_of_the_documentation_makes_a_page(copied):
    text = (ROOT / "docs" / "ablations.md").read_text()
    (example,) = re.findall(r"```\n(# Is it worth its time.*?)```", text, re.DOTALL)
    rows = records.read_csv(copied / "codes.csv")
    names = {"learned": "relu2", "gaussian": "swiglu"}
    rows = [
        row._replace(variant=names[row.variant], baseline="relu2")
        for row in rows
        if row.variant in names
    ]
    rows[0] = rows[0]._replace(bits_per_byte=2.2)
    records.write_csv(copied / "mlp.csv", rows)
    (copied / "questions" / "10_mlp.md").write_text(example)
    page = result_pages.build(FOLDER)["results/mlp.md"]
    assert "not resolved (" in page
    seeds = "--config.seeds='(0, 1, 2)'"
    command = f"--config=configs/ablations/codes.py {seeds} --workdir=runs/ablations/mlp"
    assert command in page


def test_commands_need_a_study(copied):
    shutil.copy(ROOT / FOLDER / "policy_grpo.printed.csv", copied)
    text = "# Q?\n\nIt is ${policy_grpo/mean/gained|better}.\n\n${plot policy_grpo/gained: x}\n\n"
    path = copied / "questions" / "2_policy.md"
    path.write_text(text + "${policy_grpo}\n")
    assert "+0.424 to +0.856" in result_pages.build(FOLDER)["results/policy.svg"]
    path.write_text(text + "${policy_grpo}\n\n${commands}\n")
    with pytest.raises(InputError, match=r"2_policy\.md: no study"):
        result_pages.build(FOLDER)


def test_questions_are_in_the_order_of_their_numbers(copied):
    text = (copied / "questions" / "1_codes.md").read_text()
    for name in ("10_last", "2_middle"):
        (copied / "questions" / f"{name}.md").write_text(text)
    assert [one.name for one in result_pages.sources(FOLDER)] == ["codes", "middle", "last"]
    (copied / "questions" / "codes.md").write_text(text)
    with pytest.raises(InputError, match="the name of a question is NUMBER_NAME"):
        result_pages.sources(FOLDER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", "not a table"),
        ("a,b\n1\n", "not a table"),
        ("a,b\nx,0.1 ± much\n", "column 'b': could not convert"),
    ],
)
def test_a_printed_table_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "x.printed.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        result_tables.load(tmp_path)["x"].effects("b")
