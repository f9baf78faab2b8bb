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

# Seconds after which no thread of the other side waits busily any more.
_REST = 1.0


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


def main(folder, python):
    """Prints the table."""
    command.use_huge_pages()
    source = open_pretrained(folder)
    greedy, prefill = reading(source)
    ours = {"step": training(source, 0), "lora": training(source, 8)}
    ours |= {"greedy": greedy, "prefill": prefill}
    worker = subprocess.Popen(
        [python, Path(__file__).with_name("torch_worker.py"), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"},
    )

    def theirs(name):
        time.sleep(_REST)
        worker.stdin.write(name + "\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    seconds = {}
    for turn in range(ROUNDS + 1):
        for name, one in ours.items():
            time.sleep(_REST)
            begin = time.perf_counter()
            one()
            found = {f"ours {name}": time.perf_counter() - begin}
            if name != "lora":
                found[f"transformers {name}"] = theirs(name)
            if turn:  # The first compiles.
                for what, value in found.items():
                    seconds.setdefault(what, []).append(value)
    worker.stdin.close()
    median = {what: statistics.median(values) for what, values in seconds.items()}
    for name in ("step", "greedy", "prefill"):
        mine, other = median[f"ours {name}"], median[f"transformers {name}"]
        print(f"{name}: {mine:.3f} s, transformers {other:.3f} s: {other / mine:.2f} x")
    lora = median["ours lora"]
    print(f"adapters: {lora:.3f} s: {median['ours step'] / lora:.2f} x the speed of the full step")


if __name__ == "__main__":
    main(*sys.argv[1:])
