r"""Train steps of this code, of nanodo and of nanoGPT, on one machine in turns of processes.

python benchmarks/peers.py --nanodo=CLONE --nanogpt=CLONE --torch=PYTHON \
    [--shapes=tiny,small] [--rounds=3] [--steps=8]

CLONE is a working copy of github.com/google-deepmind/nanodo or github.com/karpathy/nanoGPT, PYTHON
an interpreter with torch; a peer without its clone is left out. Shapes are those of
configs/benchmark.py: layers, width, heads, vocabulary, rows and tokens are equal, weights and
products are float32, the optimizer is AdamW, tokens are random. Each is run as its own users run
it: this code by `launch.benchmark`, with two micro-batches where the shape has them; nanodo's model
and optimizer under jax.jit; nanoGPT's as they are, and under torch.compile. Prints tokens a second,
medians over the rounds of medians over the steps, and the ratio of this code to the best peer.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from configs.benchmark import SHAPES
from lm import strict_json

ROOT = Path(__file__).resolve().parent.parent


def ours(shape: str, steps: int) -> float:
    """Tokens a second of this code."""
    options = [f"--shapes={shape}", "--pieces=", "--nostart_up", f"--repeats={steps}", "--json"]
    printed = _run([sys.executable, "-m", "launch.benchmark", *options])
    return strict_json.loads(printed)["items"][f"step {shape}"]["tokens_per_second"]


def theirs(python: str, peer: str, clone: str, shape: str, steps: int) -> float:
    """Tokens a second of a peer of benchmarks/peer_worker.py."""
    layers, width, heads, vocabulary, length, rows, _ = SHAPES[shape]
    sizes = map(str, (layers, width, heads, vocabulary, length, rows, steps))
    worker = str(Path(__file__).with_name("peer_worker.py"))
    return rows * length / float(_run([python, worker, peer, clone, *sizes]).split()[-1])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:4])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def measure(
    codes: dict[str, Callable[[str, int], float]], shapes: list[str], rounds: int, steps: int
) -> dict[str, dict[str, float]]:
    """Median tokens a second by shape and code; in every round each code has a turn."""
    speeds = {shape: {name: [] for name in codes} for shape in shapes}
    for shape in shapes:
        for _ in range(rounds):
            for name, code in codes.items():
                speeds[shape][name].append(code(shape, steps))
    return {
        shape: {name: statistics.median(values) for name, values in found.items()}
        for shape, found in speeds.items()
    }


def table(speeds: dict[str, dict[str, float]]) -> list[str]:
    """Lines of Markdown: a shape each, the codes, and the first code over the best of the rest."""
    first, *peers = next(iter(speeds.values()))
    lines = [
        "| " + " | ".join(["shape", first, *peers, f"{first} / best peer"]) + " |",
        "|---" * (len(peers) + 3) + "|",
    ]
    for shape, found in speeds.items():
        ratio = found[first] / max(found[name] for name in peers)
        figures = [f"{found[name]:,.0f}" for name in (first, *peers)]
        lines.append("| " + " | ".join([shape, *figures, f"{ratio:.2f}"]) + " |")
    return lines


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanodo", help="a working copy of nanodo")
    parser.add_argument("--nanogpt", help="a working copy of nanoGPT")
    parser.add_argument("--torch", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--shapes", default="tiny,small,tiny_50k,small_50k")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a process")
    given = parser.parse_args()
    shapes = given.shapes.split(",")
    for shape in shapes:
        if shape not in SHAPES:
            parser.error(f"--shapes={shape} is not one of: {', '.join(SHAPES)}")
    for flag in ("rounds", "steps"):
        if getattr(given, flag) < 1:
            parser.error(f"--{flag}={getattr(given, flag)} must be at least 1")
    codes = {"this code": ours}
    for flag, file in (("nanodo", "nanodo/model.py"), ("nanogpt", "model.py")):
        clone = getattr(given, flag)
        if clone and not (Path(clone) / file).is_file():
            parser.error(f"--{flag}={clone} has no {file}; valid: a working copy of {flag}")
    if given.nanodo:
        codes["nanodo"] = _peer(sys.executable, "nanodo", given.nanodo)
    if given.nanogpt:
        codes["nanoGPT"] = _peer(given.torch, "nanogpt", given.nanogpt)
        codes["nanoGPT compiled"] = _peer(given.torch, "nanogpt_compiled", given.nanogpt)
    if len(codes) == 1:
        parser.error("no peer: give --nanodo, --nanogpt or both")
    print("\n".join(table(measure(codes, shapes, given.rounds, given.steps))))


def _peer(python: str, peer: str, clone: str) -> Callable[[str, int], float]:
    clone = str(Path(clone).resolve())
    return lambda shape, steps: theirs(python, peer, clone, shape, steps)


if __name__ == "__main__":
    main()
