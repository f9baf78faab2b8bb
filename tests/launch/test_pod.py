"""launch.pod against stand-ins for gcloud, sbatch, xpk and kubectl that fail on order."""

import os
import re
import shlex
import subprocess
import sys
import tempfile

import pytest
from absl import flags
from pod_stand_ins import GKE, ROOT, SLURM, TPU, TRAIN, Outside


@pytest.fixture(scope="module", autouse=True)
def _flags_of_other_tests():
    flags.FLAGS.unparse_flags()
    yield
    flags.FLAGS.unparse_flags()


@pytest.fixture
def outside(tmp_path, monkeypatch, capsys):
    return Outside(tmp_path, monkeypatch, capsys)


RUN = ["ask", "scp", "install", "start", "follow", "ask"]


def test_create_asks_for_what_the_flags_say(outside):
    code, _, _ = outside.launch("create", *TPU, "--slices=4", "--spot", "--project=p")
    assert code == 0
    (call,) = outside.calls()
    assert call == shlex.split(
        "gcloud compute tpus queued-resources create demo --node-count=4 --node-prefix=demo "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot "
        "--zone=us-west4-a --project=p"
    )


@pytest.mark.parametrize(
    ("accelerator", "kind", "runtime"),
    [
        ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v6e-256", "v2-alpha-tpuv6e"),
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_every_generation_has_its_software(outside, accelerator, kind, runtime):
    outside.launch("create", "--name=demo", "--zone=z", f"--accelerator={accelerator}")
    (call,) = outside.calls()
    assert f"--accelerator-type={kind}" in call
    assert f"--runtime-version={runtime}" in call
    assert "--node-id=demo" in call
    assert "--spot" not in call


def test_run_requests_installs_starts_and_follows(outside):
    code, out, err = outside.launch("run", *TPU, *TRAIN)
    assert code == 0, err
    assert outside.verbs() == ["describe", "create", "describe", *RUN]
    assert out == "step 1/1  loss 1.0\n"
    assert "launch.pod delete --name=demo" in err
    start = next(" ".join(words) for words in outside.calls() if "setsid" in " ".join(words))
    assert "--node=all --worker=all" in start
    assert "--config=configs/quickstart.py --config.train.batch_size=32" in start
    assert "--workdir=gs://bucket/demo --stopped_code=75" in start
    (follow,) = (words for words in outside.calls() if "tail -n +1" in " ".join(words))
    assert {"--node=0", "--worker=0"} <= set(follow)


def test_what_is_copied_is_the_working_tree(outside):
    outside.launch("run", *TPU, *TRAIN)
    scp = next(words for words in outside.calls() if words[4] == "scp")
    names = subprocess.run(["tar", "-tzf", scp[5]], capture_output=True, text=True, check=True)
    names = names.stdout.split()
    assert "launch/train.py" in names
    assert "pyproject.toml" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_the_scripts_for_the_workers_are_sound_shell_and_do_what_they_say(outside, tmp_path):
    """Start, follow and ask, run by a real shell as a worker's would, the training replaced."""
    outside.launch("run", *TPU, *TRAIN)
    scripts = [w.partition("=")[2] for c in outside.calls() for w in c if w.startswith("--command")]
    ask, install, start, follow, _ = scripts
    assert subprocess.run(["bash", "-n", "-c", install], check=True)
    home = tmp_path / "home"
    python = home / "nibble" / ".venv" / "bin" / "python"

    def worker(script):
        done = subprocess.run(["bash", "-c", script], cwd=home, capture_output=True, text=True)
        return done.stdout.strip()

    home.mkdir()
    assert worker(ask) == ""
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "asked $*"\nsleep 0.5\nexit 75\n')
    python.chmod(0o755)
    assert worker(ask) == ""
    worker(start)
    assert worker(ask) == "running"
    assert worker(follow).startswith("asked -m launch.train --config=configs/quickstart.py")
    assert worker(ask) == "75"


def test_a_preemption_is_waited_out_and_the_training_goes_on(outside):
    """The workers go away in the middle of the log, and with them the connections."""
    gone = "ERROR: (gcloud) [/usr/bin/ssh] exited with return code [255].\n"
    outside.order("tail -n", out="step 1/9  loss 2\n", code=255, state="SUSPENDING")
    outside.order("cat train.exit", when="SUSPENDING", times=9, err=gone, code=1)
    outside.order(" describe ", when="SUSPENDING", out="SUSPENDING\n", state="SUSPENDED")
    code, out, err = outside.launch("run", *TPU, *TRAIN)
    assert code == 0, err
    verbs = outside.verbs()
    assert verbs.count("create") == 2
    assert verbs.count("delete") == 1
    assert verbs.count("start") == 2
    assert verbs.index("delete") < len(verbs) - verbs[::-1].index("create")
    assert out.splitlines() == ["step 1/9  loss 2", "step 1/1  loss 1.0"]
    assert "interrupted and goes on from its checkpoint" in err
    starts = [words for words in outside.calls() if "setsid" in " ".join(words)]
    assert starts[0] == starts[1]  # The same command, so it resumes from the bucket.


def _run_with_states(outside, states):
    """A run where Google answers the first questions for the state with `states`."""
    missing = "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: none\n"
    for state in states:
        if state:
            outside.order(" describe ", out=state + "\n", state=state)
        else:
            outside.order(" describe ", err=missing, code=1)
    return outside.launch("run", *TPU, *TRAIN)


def test_a_stopped_training_is_started_again_on_slices_that_stay(outside):
    outside.order("cat train.exit")
    outside.order("cat train.exit", out="75\n")
    code, _, err = outside.launch("run", *TPU, *TRAIN)
    assert code == 0, err
    verbs = outside.verbs()
    assert verbs.count("start") == 2
    assert verbs.count("create") == 1
    assert "delete" not in verbs


def test_a_training_that_fails_by_itself_is_not_started_again(outside):
    outside.order("cat train.exit")
    outside.order("cat train.exit", out="2\n")
    code, _, err = outside.launch("run", *TPU, *TRAIN)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: the training ended with exit code 2")
    assert outside.verbs().count("start") == 1


def test_a_lost_connection_is_taken_up_where_it_was(outside):
    outside.order("cat train.exit")
    outside.order("tail -n", out="one\ntwo\n", code=255)
    outside.order("cat train.exit", out="running\n")
    code, out, _ = outside.launch("run", *TPU, *TRAIN)
    assert code == 0
    assert out.splitlines() == ["one", "two", "step 1/1  loss 1.0"]
    assert any("tail -n +3 " in " ".join(words) for words in outside.calls())
    assert outside.verbs().count("start") == 1


def test_a_second_run_follows_the_training_that_runs(outside):
    (outside.folder / "state").write_text("ACTIVE")
    outside.order("cat train.exit", out="running\n")
    outside.order("cat train.exit", out="0\n")
    code, _, _ = outside.launch("run", *TPU, *TRAIN)
    assert code == 0
    assert outside.verbs() == ["describe", "ask", "follow", "ask"]


def test_waits_in_the_queue_and_replaces_a_request_that_is_over(outside):
    states = ["FAILED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    code, _, err = _run_with_states(outside, states)
    assert code == 0
    verbs = ["describe", "delete", "create", "describe", "describe", "describe", *RUN]
    assert outside.verbs() == verbs
    assert "demo: WAITING_FOR_RESOURCES" in err


def test_gives_up_when_google_fails_the_request(outside):
    code, _, err = _run_with_states(outside, ["", "FAILED"])
    assert code == 1
    assert err.splitlines()[-1] == "error: the request demo has FAILED: launch.pod status"


def test_gives_up_after_so_many_restarts(outside):
    outside.order("cat train.exit", times=99, out="75\n")
    code, _, err = outside.launch("run", *TPU, *TRAIN, "--restarts=2")
    assert code == 1
    assert "gave up after 2 restarts" in err
    assert outside.verbs().count("start") == 3


def test_a_passing_failure_is_tried_again(outside):
    passing = "ERROR: (gcloud.create) UNAVAILABLE: The service is currently unavailable.\n"
    outside.order(" create ", times=2, err=passing, code=1)
    code, _, err = outside.launch("create", *TPU, "--poll_seconds=0.001")
    assert code == 0
    assert len(outside.calls()) == 3
    assert err.count("UNAVAILABLE") == 2


def test_a_passing_failure_that_stays_ends_with_its_message(outside):
    outside.order(" create ", times=9, err="noise\nERROR: x UNAVAILABLE:\n  down.\n", code=1)
    code, _, err = outside.launch("create", *TPU, "--poll_seconds=0.001")
    assert code == 1
    assert len(outside.calls()) == 4
    assert err.splitlines()[-1] == "error: gcloud: ERROR: x UNAVAILABLE: down."


def test_a_quota_is_not_tried_again(outside):
    quota = "ERROR: (gcloud.create) RESOURCE_EXHAUSTED: Quota 'TPUV5sLitepod' exhausted.\n"
    outside.order(" create ", err=quota, code=1)
    code, _, err = outside.launch("create", *TPU)
    assert code == 1
    assert err == f"error: gcloud: {quota}"
    assert len(outside.calls()) == 1


def test_logs_status_and_delete(outside):
    assert outside.launch("status", *TPU)[1] == "there is no such request\n"
    outside.launch("create", *TPU)
    assert outside.launch("status", *TPU)[1] == "ACTIVE\n"
    assert outside.launch("logs", *TPU)[1] == "step 1/1  loss 1.0\n"
    assert outside.launch("delete", *TPU)[0] == 0
    assert {"--force", "--quiet"} <= set(outside.calls()[-1])


def test_a_dry_run_shows_what_a_run_calls_and_calls_nothing(outside):
    """The commands shown are those that a run through a preemption calls, in their order."""
    code, out, err = outside.launch("run", *TPU, *TRAIN, "--dry_run")
    assert (code, err, outside.calls()) == (0, "", [])
    shown = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    outside.launch("run", *TPU, *TRAIN)
    outside.launch("delete", *TPU)
    called = outside.calls()
    called.pop(2)  # The second question for the state, which a comment stands for.
    assert [words for words in shown if words[0] == "gcloud"] == called
    assert sum(words[0] == "tar" for words in shown) == 1


def test_keys_travel_in_a_file_and_in_no_command(outside, tmp_path):
    secret = tmp_path / "keys.env"
    secret.write_text("WANDB_API_KEY=swordfish\n")
    project = "--config.train.wandb_project=nibble"
    code, _, _ = outside.launch("run", *TPU, *TRAIN, f"--env_file={secret}", project)
    assert code == 0
    text = (outside.folder / "calls").read_text()
    assert "swordfish" not in text
    assert str(secret) in text
    assert "chmod 600 nibble.env" in text
    assert ".[tpu,wandb]" in text


README = (ROOT / "docs" / "launch.md").read_text()
SHOWN = re.findall(
    r"```bash\n(python -m launch\.pod [^\n]*)\n```\n\n```text\n(.*?)```", README, flags=re.DOTALL
)


@pytest.mark.parametrize("number", range(3))
def test_the_readme_shows_what_a_dry_run_prints(outside, number):
    """Line by line; "..." stands for anything."""
    words, text = SHOWN[number]
    code, out, err = outside.launch(*shlex.split(words)[3:])
    assert (code, err, outside.calls()) == (0, "", [])
    archive = re.escape(os.path.join(tempfile.gettempdir(), "nibble"))
    pattern = re.escape(text).replace(re.escape("..."), ".*").replace("/tmp/nibble", archive)
    assert re.fullmatch(pattern, out, flags=re.DOTALL), out


def test_every_command_of_the_readme_is_accepted(outside):
    commands = re.findall(r"^python -m (launch\.pod .*)$", README, flags=re.MULTILINE)
    assert len(commands) == len(SHOWN) + 3 == 6
    for words in commands:
        assert outside.launch(*shlex.split(words)[1:])[0] == 0
    assert outside.calls() == []


BAD = {
    "platform": ("run", ["--platform=aws"], "--platform=aws is not one of: tpu, slurm, gke"),
    "name": ("run", ["--name="], "--name= must be"),
    "shell in a name": ("run", [*TPU, "--name=a;b"], "--name=a;b must be"),
    "zone": ("create", ["--name=demo"], "--zone is missing"),
    "accelerator": ("create", ["--name=demo", "--zone=z"], "--accelerator is missing"),
    "generation": ("create", [*TPU, "--accelerator=v9-8"], "--accelerator=v9-8 is not a TPU type"),
    "slices": ("create", [*TPU, "--slices=0"], "--slices=0 must be at least 1"),
    "no config": ("run", TPU, "--config=FILE.py is missing"),
    "no workdir": ("run", [*TPU, *TRAIN[:2]], "--workdir is missing"),
    "local workdir": ("run", [*TPU, *TRAIN, "--workdir=runs/x"], "is not in a bucket"),
    "bucket alone": ("run", [*TPU, *TRAIN, "--workdir=gs://bucket"], "is not in a bucket"),
    "mesh": ("run", [*TPU, *TRAIN, "--config.mesh.fsdp=32"], "does not match 16 devices"),
    "batch": ("run", [*TPU, *TRAIN, "--slices=3"], "valid: a multiple of 48"),
    "corpus": ("run", [*TPU, *TRAIN, "--config.data.corpus=docs"], "is on this machine"),
    "keys": ("run", [*TPU, *TRAIN, "--env_file=/nowhere"], "--env_file=/nowhere: no such file"),
    "cluster": ("run", GKE[:3], "--cluster is missing"),
    "slurm create": ("create", SLURM, "create is for --platform=tpu"),
    "nodes": ("run", [*SLURM, *TRAIN, "--nodes=0"], "--nodes=0 must be at least 1"),
    "option": ("run", [*SLURM, *TRAIN, "--sbatch=gpu"], "--sbatch=gpu is not an option"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_calls_nothing(outside, name):
    action, arguments, expected = BAD[name]
    code, out, err = outside.launch(action, *arguments)
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert expected in err
    assert (out, outside.calls()) == ("", [])


def test_a_missing_program_is_named(outside, monkeypatch):
    monkeypatch.setenv("PATH", str(outside.folder))
    code, _, err = outside.launch("create", *TPU)
    assert code == 2
    assert err.startswith("error: there is no program gcloud on PATH")
    assert outside.launch("create", *TPU, "--dry_run")[0] == 0


def test_the_command_itself():
    """As a user types it: the exit codes, and that the config is checked before anything."""

    def pod_command(*words):
        return subprocess.run(
            [sys.executable, "-m", "launch.pod", *words], cwd=ROOT, capture_output=True, text=True
        )

    done = pod_command("runn", *TPU)
    assert (done.returncode, done.stderr) == (
        2,
        "error: say what to do, one of: create, run, logs, status, delete\n",
    )
    done = pod_command("run", *TPU, *TRAIN, "--config.train.step=3", "--dry_run")
    assert done.returncode == 2
    assert "did you mean train.steps" in done.stderr
    done = pod_command("run", *TPU, "--config", "configs/quickstart.py", *TRAIN[1:], "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "launch.train --config=configs/quickstart.py --config.train.batch_size=32" in done.stdout
