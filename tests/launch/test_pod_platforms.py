"""launch.pod on SLURM and GKE, against stand-ins for sbatch, xpk and kubectl."""

import os
import re
import subprocess

import pytest
from absl import flags
from pod_stand_ins import GKE, SLURM, TRAIN, Outside


@pytest.fixture(scope="module", autouse=True)
def _flags_of_other_tests():
    flags.FLAGS.unparse_flags()
    yield
    flags.FLAGS.unparse_flags()


@pytest.fixture
def outside(tmp_path, monkeypatch, capsys):
    return Outside(tmp_path, monkeypatch, capsys)


def test_slurm_writes_a_script_from_the_config_and_hands_it_in(outside, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config=configs/quickstart.py", f"--workdir={workdir}"]
    options = ["--sbatch=--partition=gpu", "--sbatch=--time=24:00:00"]
    code, out, _ = outside.launch("run", *SLURM, *arguments, *options)
    assert code == 0
    assert out == "Submitted batch job 7\n"
    assert outside.calls() == [["sbatch", str(workdir / "demo.sbatch")]]
    script = (workdir / "demo.sbatch").read_text()
    set_by = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, flags=re.MULTILINE))
    assert set_by == {
        "job-name": "demo",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "partition": "gpu",
        "time": "24:00:00",
        "output": str(workdir / "demo.log"),
        "open-mode": "append",
        "requeue": "",
        "signal": "TERM@180",
    }
    assert f"--config=configs/quickstart.py --workdir={workdir}" in script


@pytest.mark.parametrize(("ended", "queued_again"), [(0, False), (75, True), (1, False)])
def test_a_stopped_slurm_job_queues_again(outside, tmp_path, ended, queued_again):
    """The script itself, run by bash, with srun and scontrol replaced."""
    workdir = tmp_path / "run"
    outside.launch("run", *SLURM, "--config=configs/quickstart.py", f"--workdir={workdir}")
    for name, code in (("srun", ended), ("scontrol", 0)):
        path = outside.folder / "bin" / name
        path.write_text(f"#!/bin/sh\necho {name} $* >> {outside.folder}/script\nexit {code}\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", str(workdir / "demo.sbatch")], env={**os.environ, "SLURM_JOB_ID": "7"}, check=False
    )
    assert done.returncode == ended
    lines = (outside.folder / "script").read_text().splitlines()
    assert lines[0].startswith("srun --kill-on-bad-exit=0")
    assert ("scontrol requeue 7" in lines) == queued_again


def test_slurm_dry_run_status_and_delete(outside, tmp_path):
    arguments = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    code, out, _ = outside.launch("run", *SLURM, *arguments, "--dry_run")
    assert code == 0
    assert "#SBATCH --nodes=2" in out
    assert out.splitlines()[-1] == f"sbatch {tmp_path / 'run' / 'demo.sbatch'}"
    assert not (tmp_path / "run").exists()
    outside.launch("status", *SLURM)
    outside.launch("delete", *SLURM)
    assert outside.calls() == [
        ["squeue", "--name=demo", "--me"],
        ["scancel", "--name=demo", "--me"],
    ]


def test_a_refusal_of_sbatch_is_its_message(outside, tmp_path):
    message = "sbatch: error: invalid partition specified: gpu"
    outside.order("^sbatch", err=message + "\n", code=1)
    arguments = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    code, _, err = outside.launch("run", *SLURM, *arguments)
    assert (code, err.splitlines()[-1]) == (1, f"error: sbatch: {message}")


def test_gke_starts_logs_lists_and_deletes_a_workload(outside):
    run = [*GKE, "--accelerator=v5e-16", "--slices=2", "--spot", *TRAIN]
    assert outside.launch("run", *run)[0] == 0
    (call,) = outside.calls()
    assert call[:3] == ["xpk", "workload", "create"]
    options = dict(word[2:].partition("=")[::2] for word in call[3:])
    inner = options.pop("command")
    assert options == {
        "cluster": "tpus",
        "zone": "us-west4-a",
        "workload": "demo",
        "tpu-type": "v5litepod-16",
        "num-slices": "2",
        "spot": "",
        "base-docker-image": "python:3.12",
        "script-dir": ".",
        "max-restarts": "100",
        "restart-on-user-code-failure": "",
        "termination-grace-period-seconds": "180",
    }
    assert inner.startswith("pip install --quiet -e '.[tpu]' && python -m launch.train --config=")
    assert inner.endswith("--workdir=gs://bucket/demo --stopped_code=75")
    for action in ("logs", "status", "delete"):
        assert outside.launch(action, *GKE)[0] == 0
    asked = [" ".join(words[:3]) for words in outside.calls()[1:]]
    assert asked == ["kubectl logs --follow", "xpk workload list", "xpk workload delete"]
