"""docs/policy_rewards.md: its own reward applies as a patch and is judged by."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lm.rollouts.rewards import REWARDS

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "policy_rewards.md").read_text()

USE = """
from configs import base
from lm.rollouts.judge import Judge
from lm.rollouts.make_rewards import make_rewards

config = base.get_config()
config.rollouts.rewards = "exact,one_line"
config.rollouts.one_line.fewest = 3
with Judge(make_rewards(config.rollouts), 60.0) as judge:
    texts = ["long", "a b", "no", "two\\nlines"]
    print(judge.judge(texts, [{"answer": "long"}] * 4).total_N.tolist())
config.rollouts.one_line.fewest = 0
try:
    make_rewards(config.rollouts)
except ValueError as error:
    print(error)
"""


def test_a_reward_of_ones_own_is_one_file_and_one_line(tmp_path):
    (patch,) = re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL)
    files = re.findall(r"^diff --git a/(\S+)", patch, flags=re.MULTILINE)
    assert files == ["lm/rollouts/rewards/__init__.py", "lm/rollouts/rewards/one_line.py"]
    for folder in ("lm", "objectives", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    # Outside of any repository, git apply is a patch program.
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[2.0, 1.0, 0.0, 0.0]",
        "rollouts.one_line.fewest=0 must be at least 1",
    ]


def test_the_page_names_every_reward_and_its_arguments():
    named = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert named == list(REWARDS)
    for factory in REWARDS.values():
        for name in set(factory.__annotations__) - {"return", "shape", "well_formed"}:
            assert name in PAGE
