"""README and docs: their patches apply and run, their commands and links are right."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from short_runs import train

from configs import base
from launch import methods

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
FOUND = [*DOCS.glob("*.md"), *DOCS.glob("results/*.md")]
PAGES = {"README.md": README} | {str(p.relative_to(DOCS)): p.read_text() for p in FOUND}
PATCHES = re.findall(r"```diff\n(.*?)```\s*```bash\n(.*?)```", PAGES["extend.md"], flags=re.DOTALL)
SMALL = (
    "--config.model.layers=1 --config.model.width=32 --config.model.mlp_width=32 "
    "--config.data.sequence_length=32 --config.data.validation_fraction=0.3 "
    "--config.data.shuffle_rows=8 --config.train.steps=3 "
    "--config.train.log_every=1 --config.optimizer.warmup_steps=1 --config.evaluation.batches=1 "
    "--config.evaluation.sample_tokens=0 --config.train.tensorboard=False"
)


def commands():
    """Every command of the pages, as words; a line that goes on counts as one."""
    for page, text in PAGES.items():
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for found in re.findall(r"python -m (launch\.\w+[^&|#]*)", line):
                    yield page, shlex.split(found)


def test_there_are_patches_and_commands():
    assert len(PATCHES) == 3
    assert len(list(commands())) > 15


def test_the_readme_is_short():
    assert len(README.encode()) <= 9 * 1024


def test_a_weighting_of_ones_own_is_one_file_and_one_line():
    ((patch, command),) = [one for one in PATCHES if "with_context" in one[0]]
    files = re.findall(r"^diff --git a/(\S+)", patch, flags=re.MULTILINE)
    assert sorted(files) == [
        "objectives/weighting/__init__.py",
        "objectives/weighting/with_context.py",
    ]
    assert "objective.weighting=with_context" in command


def test_every_patch_applies(tmp_path):
    for folder in ("lm", "objectives"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for patch, _ in PATCHES:
        subprocess.run(
            ["git", "apply", "--check", "-"], input=patch, text=True, cwd=tmp_path, check=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("number", tiny.mostly_slow(range(len(PATCHES)), (0,)))
def test_a_patch_applies_and_runs(number, tmp_path):
    patch, command = PATCHES[number]
    for folder in ("lm", "objectives", "launch", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    # Outside of any repository, git apply is a patch program.
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    small = SMALL
    if "data.corpus" not in command:
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        for i in range(20):
            (corpus / f"{i}.txt").write_text(f"text number {i} " * 40)
        small += f" --config.data.corpus={corpus}"
    environment = tiny.one_device(PYTHONPATH=tmp_path)
    arguments = command.strip().removeprefix("python ").split() + small.split()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stderr
    assert "bits/byte" in done.stdout


def test_ci_runs_the_two_commands_of_the_readme():
    setup = r"^python3 -m venv \.venv && .*"
    assert len(re.findall(setup + r"launch\.train.*quickstart.*", README, flags=re.MULTILINE)) == 1
    assert len(re.findall(setup + r"pytest.*", README, flags=re.MULTILINE)) == 1


def test_every_command_is_on_its_page():
    named = set(re.findall(r"python -m launch\.(\w+)", PAGES["commands.md"]))
    sources = {p.stem: p.read_text() for p in (ROOT / "launch").glob("*.py")}
    assert named == {name for name, text in sources.items() if "command.run(main" in text}


def test_every_command_has_flags_config_files_and_keys_that_exist():
    defined = {
        name
        for path in (ROOT / "launch").rglob("*.py")
        for name in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', path.read_text())
    }
    keys = set(base.meanings()) | {"objective.second_head.coefficient", "objective.hinge.delta"}
    for page, (module, *words) in commands():
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), page
        if module == "launch.harness":  # Its flags are lm_eval's.
            continue
        for word in words:
            flag = word.removeprefix("--").partition("=")[0]
            if not word.startswith("--"):
                continue
            if flag.startswith("config.") and not flag.startswith(("config.base.", "config.seeds")):
                assert flag.removeprefix("config.") in keys, f"{page}: {word}"
            elif flag == "config":
                file = word.partition("=")[2].partition(":")[0]
                here = (ROOT / file).exists() or f"`{file}`" in PAGES[page]
                assert here, f"{page}: {word}"
            elif not flag.startswith("config"):
                assert flag.removeprefix("no") in defined or flag in defined, f"{page}: {word}"


def test_every_link_leads_somewhere():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else (DOCS / page).parent
        for link in re.findall(r"\]\(([^)#]+)[)#]", text):
            if "://" not in link:
                assert (folder / link).exists(), f"{page}: {link}"


def test_the_page_of_methods_is_that_of_the_code():
    """Made by python -m launch.plan --methods > docs/methods.md."""
    assert PAGES["methods.md"] == methods.as_markdown() + "\n"


@pytest.mark.slow
def test_the_notebook_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    corpus = tiny.write_corpus(tmp_path / "corpus")
    config = tiny.config(data__corpus=corpus, train__steps=1, optimizer__warmup_steps=0)
    config.model.layers = 1
    train(config, tmp_path / "runs" / "quickstart")
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["notebooks.md"], flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "notebooks.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "'final_norm'" in shown
    assert "(1, 12, 32)" in shown
