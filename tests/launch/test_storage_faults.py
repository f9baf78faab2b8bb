"""Real runs on disks that become full or read-only, and go on when that is over."""

import json
import resource
import subprocess

import pytest
import tiny
from etils import epath
from processes import finish, lines, saved, start, train, wait_for_step

from lm.runs import integrity

pytestmark = pytest.mark.slow

SHORT = ["--config.train.steps=60", "--config.evaluation.every_steps=30"]
SAVES = ["--config.checkpoint.every_steps=5", "--config.checkpoint.keep=9"]
BOARD = ["--config.train.tensorboard=True"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run on a disk that has no end."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(workdir, corpus, 1, *SHORT)
    return workdir


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A file system of 1.5 MiB, where this user may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = mount("-t", "tmpfs", "-o", "size=1536k", "tmpfs", folder)
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def check_ended_well(ended, workdir, reason):
    """One line says why, whatever was saved is whole, and no line of the metrics is not."""
    ((code, _, err),) = ended
    assert code == 74, err
    *steps, last = err.splitlines()
    assert all(line.startswith("step ") or "parameters" in line for line in steps), err
    assert last.startswith("error: ")
    assert f" cannot be written: {reason}. The newest checkpoint is that of step " in last
    steps = saved(workdir)
    assert f"that of step {steps[-1]};" in last
    folder = epath.Path(workdir) / "checkpoints"
    assert [integrity.damage(folder / str(step)) for step in steps] == [""] * len(steps)
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= 60


def check_goes_on(workdir, corpus, whole, before):
    ((_, _, err),) = train(workdir, corpus, 1, *SHORT, *SAVES)
    assert f"resumed at step {before}\n" in err
    for kind in ("train", "validation"):
        assert lines(workdir, kind) == lines(whole, kind)


def test_a_full_disk_stops_the_run_and_it_goes_on_bit_for_bit(corpus, whole, disk):
    ended = finish(start(disk / "run", corpus, 1, *SHORT, *SAVES, *BOARD))
    check_ended_well(ended, disk / "run", "No space left on device")
    before = saved(disk / "run")[-1]
    # Still full: nothing can be saved, and nothing is lost.
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(1 << 21))
    ((code, _, err),) = finish(start(disk / "run", corpus, 1, *SHORT, *SAVES))
    assert (code, err.splitlines()[-1]) == (
        2,
        f"error: --workdir={disk}/run cannot be written: No space left on device",
    )
    assert saved(disk / "run")[-1] == before
    ballast.unlink()
    assert mount("-o", "remount,size=32m", disk)
    check_goes_on(disk / "run", corpus, whole, before)


def test_a_quota_stops_the_run_and_it_goes_on_bit_for_bit(corpus, whole, tmp_path):
    """For users who cannot mount: from some step on, no file may grow beyond 32 KiB."""
    workdir = tmp_path / "run"
    started = start(workdir, corpus, 1, *SHORT, *SAVES)
    wait_for_step(workdir, 12, started)
    limit = (32768, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    resource.prlimit(started[0].pid, resource.RLIMIT_FSIZE, limit)
    check_ended_well(finish(started), workdir, "File too large")
    check_goes_on(workdir, corpus, whole, saved(workdir)[-1])


def test_a_disk_that_becomes_read_only_stops_the_run(corpus, whole, disk, tmp_path):
    """The checkpoints' own, so that no file is open on it between two saves."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(disk)
    started = start(workdir, corpus, 1, *SHORT, *SAVES[:1])
    wait_for_step(workdir, 12, started)
    while not mount("-o", "remount,ro", disk):
        assert started[0].poll() is None
    check_ended_well(finish(started), workdir, "Read-only file system")
    before = saved(workdir)[-1]
    assert mount("-o", "remount,rw,size=32m", disk)
    check_goes_on(workdir, corpus, whole, before)


def test_a_read_only_disk_is_refused_before_the_start(corpus, disk):
    assert mount("-o", "remount,ro", disk)
    ((code, out, err),) = finish(start(disk / "run", corpus, 1, *SHORT))
    assert (code, out) == (2, "")
    assert err == f"error: --workdir={disk}/run cannot be written: Read-only file system\n"
    assert list(disk.iterdir()) == []
