"""launch.train as real processes, on a config small enough for a test."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from lm.training.reporting import TIMED

ROOT = Path(__file__).parent.parent
TINY = [
    "--config=configs/base.py",
    *(
        f"--config.{key}"
        for key in [
            "model.layers=1",
            "model.width=32",
            "model.heads=4",
            "model.kv_heads=2",
            "model.mlp_width=32",
            "data.sequence_length=32",
            "data.shuffle_rows=8",
            "data.validation_fraction=0.3",
            "train.steps=150",
            "train.batch_size=8",
            "train.log_every=1",
            "train.tensorboard=False",
            "optimizer.warmup_steps=2",
            "checkpoint.every_steps=10",
            "checkpoint.every_minutes=0",
            "evaluation.batches=1",
            "evaluation.every_steps=75",
            "evaluation.sample_tokens=4",
            "mesh.unsharded_tolerance=1",  # toys
            "distributed.join_seconds=60",
            "distributed.heartbeat_seconds=10",
        ]
    ),
]


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def start(
    workdir,
    corpus,
    processes,
    *arguments,
    devices=1,
    only=None,
    scripts=None,
    stderr=subprocess.PIPE,
):
    """launch.train in so many processes, each with so many devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # As in tests/conftest.py, but for the number of devices: the last one counts.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    port, started = free_port(), []
    for index in range(processes) if only is None else only:
        flags = [f"--coordinator=localhost:{port}", f"--processes={processes}"]
        flags += [f"--process_id={index}"]
        script = scripts[index] if scripts else ["-m", "launch.train"]
        words = [*TINY, f"--config.data.corpus={corpus}", f"--workdir={workdir}", *arguments]
        started.append(
            subprocess.Popen(
                [sys.executable, *script, *words, *(flags if processes > 1 else ())],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        )
    return started


def finish(started, timeout=500):
    """(code, standard output, standard error) of each."""
    ended = [process.communicate(timeout=timeout) for process in started]
    return [(p.returncode, *texts) for p, texts in zip(started, ended, strict=True)]


def train(*arguments, **options):
    ended = finish(start(*arguments, **options))
    assert [code for code, *_ in ended] == [0] * len(ended), ended
    return ended


def lines(workdir, kind):
    read = map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k not in TIMED} for x in read if x["kind"] == kind]


def losses(workdir, kind="train"):
    return [line["loss"] for line in lines(workdir, kind)]


def wait_for_step(workdir, step, started):
    def reached():
        try:
            return lines(workdir, "train")[-1]["step"] >= step
        except (OSError, IndexError, json.JSONDecodeError):
            return False

    while not reached():
        for process in started:
            assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def saved(workdir):
    return sorted(
        int(p.name) for p in (Path(workdir) / "checkpoints").iterdir() if p.name.isdigit()
    )
