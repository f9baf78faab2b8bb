"""An import may only point down, and heavy or foreign packages stay where they belong."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each part may import of ours, from the ground up. Its own part is always allowed. A file that
# stands on another floor than its folder comes first.
_BASE = ("lm/errors", "lm/flat", "lm/strict_json")
_GROUND = (*_BASE, "lm/model", "lm/data", "objectives")
_STEP = (*_GROUND, "lm/parallel", "lm/compression", "lm/planning/flops", "lm/references/sources")
_RUN = (*_STEP, "lm/pretrained", "lm/training", "lm/runs")
_AROUND = (
    *_RUN,
    *("lm/references", "lm/evaluation", "lm/evaluation/tasks", "lm/evaluation/harness"),
    *("lm/runs/initialise", "lm/runs/parameters_from"),
)
_LOOP = tuple(
    f"lm/training/{name}"
    for name in ("loop", "events", "quantized_phase", "interruption", "reporting")
)
BELOW = {
    "objectives": (),
    "lm/errors": (),
    "lm/flat": (),
    "lm/strict_json": (),
    "lm/model": _BASE,
    "lm/data": _BASE,
    "lm/parallel": (*_BASE, "objectives"),
    "lm/planning/flops": ("lm/model",),
    "lm/references/sources": _BASE,
    "lm/pretrained": (*_GROUND, "lm/parallel", "lm/compression"),
    "lm/runs/parameters_from": _RUN,
    "lm/runs/initialise": (*_RUN, "lm/references"),
    "lm/training/resume": _RUN,
    **{name: (*_AROUND, *_LOOP, "lm/training/resume", "lm/rollouts") for name in _LOOP},
    "lm/compression": (*_GROUND, "lm/parallel"),
    "lm/runs": (*_BASE, "lm/parallel"),
    "lm/training": _STEP,
    "lm/evaluation/tasks": (*_RUN, "lm/evaluation"),
    "lm/evaluation/harness": (*_RUN, "lm/evaluation", "lm/evaluation/tasks"),
    "lm/evaluation": (*_GROUND, "lm/parallel", "lm/compression"),
    "lm/references": _RUN,
    "lm/rollouts/rewards": _BASE,
    "lm/rollouts": (*_RUN, "lm/references", "lm/evaluation", "lm/rollouts/rewards"),
    "lm/planning": _AROUND,
    "lm/studies": (*_AROUND, "lm/planning"),
    "configs": ("objectives", "lm/errors", "lm/pretrained", "lm/rollouts/rewards"),
    "launch": ("configs", *_AROUND, "lm/rollouts", "lm/planning", "lm/studies", "lm/training/loop"),
}
FOREIGN = {
    "flax": ("lm/model",),
    "orbax": ("lm/runs/checkpoints.py",),
    "absl.flags": ("launch",),
    "absl.app": ("launch",),
    "tensorflow_datasets": ("lm/data",),
    "grain": ("lm/data", "lm/training", "lm/runs", "lm/rollouts"),
}


def sources():
    for top in ("objectives", "lm", "launch", "configs"):
        yield from sorted((ROOT / top).rglob("*.py"))


def imports(source: str):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: str) -> str | None:
    """The part that a path with slashes belongs to; None for what is not ours."""
    return next((p for p in BELOW if path == p or path.startswith((p + "/", p + "."))), None)


def violations(path: str, source: str) -> list[str]:
    home, found = part(path), []
    for name in imports(source):
        target = part(name.replace(".", "/"))
        if target and target != home and target not in BELOW[home]:
            found.append(f"{path} imports {name}")
        for package, allowed in FOREIGN.items():
            if f"{name}.".startswith(package + ".") and not path.startswith(allowed):
                found.append(f"{path} imports {name}")
    return found


def test_imports_point_down():
    seen = 0
    for path in sources():
        name = str(path.relative_to(ROOT))
        assert violations(name, path.read_text()) == []
        seen += 1
    assert seen > 20


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("objectives/x.py", "import flax.linen as nn"),
        ("objectives/x.py", "from lm.model import config"),
        ("lm/model/x.py", "from lm.training.step import make_train_step"),
        ("lm/data/x.py", "def f():\n    import lm.model"),
        ("lm/training/x.py", "import flax"),
        ("configs/x.py", "from lm.model.config import ModelConfig"),
    ],
)
def test_a_violation_is_seen(path, source):
    assert violations(path, source)


def test_importing_everything_is_light_and_warns_of_nothing():
    modules = [str(p.relative_to(ROOT))[:-3].replace("/", ".") for p in sources()]
    code = (
        "import importlib, sys\n"
        f"for name in {[m.removesuffix('.__init__') for m in modules]}:\n"
        "    importlib.import_module(name)\n"
        "heavy = {'tensorflow', 'torch', 'wandb', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_imported_package_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [declared["dependencies"], *declared["optional-dependencies"].values()]
    names = {re.split(r"[\[>=]", n)[0].replace("-", "_").lower() for group in groups for n in group}
    providers = importlib.metadata.packages_distributions()
    for path in sources():
        for name in imports(path.read_text()):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or part(top) or top in ("lm", "wandb", "lm_eval"):
                continue
            offered = {d.replace("-", "_").lower() for d in providers[top]}
            assert offered & names, f"{path} imports {top}, which pyproject.toml does not declare"


def test_no_two_files_of_tests_share_a_name():
    """Pytest imports them by their bare names, whatever their folder."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(set(names)) == sorted(names)
