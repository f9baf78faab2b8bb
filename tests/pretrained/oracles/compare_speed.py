"""Speed of this code and of transformers with torch, in turns, on one machine.

python tests/pretrained/oracles/compare_speed.py FOLDER ORACLE_PYTHON

FOLDER is a Hugging Face folder, ORACLE_PYTHON an interpreter with torch and transformers. They have
the defaults of their users; this code runs as launch.train runs it. Prints medians of seconds and
their ratios: a step of AdamW on 4 x 256 tokens, the same with adapters, 64 tokens one after the
other, and a prompt of 512.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent.parent))

from configs import finetune
from launch import command
from lm.data.layout import BATCH
from lm.model import decoding
from lm.parallel.mesh import put_batch
from lm.pretrained.source import open_pretrained
from lm.training import experiment

ROWS, LENGTH, PROMPT, TOKENS, ROUNDS = 4, 256, 512, 64, 5


def training(source, rank):
    """() -> after one step."""
    config = finetune.get_config(source.where, source)
    config.model.adapter_rank = rank
    config.train.batch_size, config.data.sequence_length = ROWS, LENGTH
    run = experiment.build(config, source.vocab_size, jax.devices()[:1])
    rng = np.random.default_rng(0)
    batch = {name: np.ones((ROWS, LENGTH), dtype) for name, dtype in BATCH.items()}
    batch["tokens"] = rng.integers(0, source.vocab_size, (ROWS, LENGTH), np.int32)
    batch["targets"] = batch["tokens"]
    batch["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    with jax.set_mesh(run.mesh):
        state = [jax.jit(run.init)(jax.random.key(0))]
        batch, step = put_batch(run.mesh, batch), run.train_step()

    def one():
        with jax.set_mesh(run.mesh):
            state[0], _ = step(state[0], batch)
            jax.block_until_ready(state[0])

    return one


def reading(source):
    """(() -> after 64 tokens, () -> after a prompt of 512)."""
    config = finetune.get_config(source.where, source)
    run = experiment.build(config, source.vocab_size, jax.devices()[:1])
    params = jax.jit(run.model.init)(jax.random.key(0))
    prompt = np.random.default_rng(0).integers(0, source.vocab_size, (1, PROMPT), np.int32)
    mask, key = np.ones_like(prompt), jax.random.key(0)
    start = jax.jit(lambda p, x, m: decoding.start(run.model, p, x, m, key, steps=TOKENS))
    advance = jax.jit(lambda p, s: decoding.advance(run.model, p, s, TOKENS, temperature=0.0))

    def greedy():
        state = start(params, prompt[:, :8], mask[:, :8])
        jax.block_until_ready(advance(params, state))

    def prefill():
        jax.block_until_ready(start(params, prompt, mask))

    return greedy, prefill


def measure(folder, name):
    """Prints the median of seconds of one thing, after it was compiled."""
    source = open_pretrained(folder)
    if name in ("greedy", "prefill"):
        one = dict(zip(("greedy", "prefill"), reading(source), strict=True))[name]
    else:
        one = training(source, rank=8 if name == "lora" else 0)
    print(_median(one))


def _median(one):
    seconds = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        one()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def main(folder, python, name=""):
    """Prints the table, or measures one thing; each is measured in a process of its own."""
    command.use_huge_pages()
    if name:
        return measure(folder, name)
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}

    def run(*arguments, environment):
        ended = subprocess.run(
            arguments, stdout=subprocess.PIPE, text=True, env=environment, check=True
        )
        return float(ended.stdout.split()[-1])

    worker = Path(__file__).with_name("torch_worker.py")
    full = None
    for name in ("step", "lora", "greedy", "prefill"):
        ours = run(sys.executable, __file__, folder, python, name, environment=os.environ)
        if name == "lora":
            print(f"adapters: {ours:.3f} s: {full / ours:.2f} x the speed of the full step")
            continue
        full = full or ours
        theirs = run(python, worker, folder, name, environment=plain)
        print(f"{name}: {ours:.3f} s, transformers {theirs:.3f} s: {theirs / ours:.2f} x")
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
