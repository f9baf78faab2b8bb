"""Training steps of this checkout and of another commit, compared number by number.

python tests/equivalence.py --reference=COMMIT [--only=TEXT] [--steps=20] [--keep=FOLDER]

Every weighting and every loss takes the same steps from the same parameters on the same batches in
both checkouts: plain, in two micro-batches, quantized, and on a mesh of eight CPU devices. Metrics
of every step and all parameters and moments at the end are compared: identical, or with the largest
difference relative to the largest entry of the array. The compiled step of two configs may have no
more FLOPs, bytes, temporaries or compiles than before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

# Twenty steps of AdamW carry float32 rounding of one step on: sums that are taken in another order
# (another number of micro-batches of the same commit) end up to 1e-4 apart.
TOLERANCE = 1e-4
NEUTRAL = 1.001  # of FLOPs and bytes: XLA's own fusion choices

WEIGHTINGS = {
    "uniform": {},
    "rho1": {"keep": 0.5},
    "ss_token": {"keep": 0.6},
    "prior": {"alpha": 1.5},
    "fait": {"strength": 2.0},
    "sat_imp": {"beta1": 0.5, "beta2": 0.3},
    "sim_sat": {"beta": 0.5},
    "sim_imp": {"beta": 2.0},
    "wga": {},
    "dft": {},
    "focal": {},
    "block_sensitive": {"strength": 2.0},
    "uskd": {},
    "frequency_equity": {},
    "critical_token": {},
    "dynamic": {"temperature": 0.4},
    "glow": {"samples": 64},
    "q_tuning": {"keep_samples": 0.5},
    "dft*dynamic": {},
}
SIGNED = ("sat_imp", "sim_sat", "sim_imp", "wga")
LOSSES = {
    "dice": {"alpha": 0.5},
    "tversky": {},
    "inverted_hinge": {},
    "one_token_rollout": {"samples": 4, "temperature": 1.3},
    "tempnet": {"width": 5, "rho": 1.0},
    "harmonic": {"distance": "mahalanobis"},
    "block_distillation": {"block_length": 5},
    "self_distillation": {"share": 0.7},
    "top_k_distillation": {"share": 0.7},
    "uld": {"coefficient": 0.5},
}
MODES = {
    "plain": {},
    "accumulated": {"train.accumulation": 2},
    "quantized": {
        "quantization.bits": 4.0,
        "quantization.fraction": "1.0",
        "quantization.fused_cooldown": False,
        "quantization.warmup_steps": 1,
    },
    "mesh": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
}
STORED = (
    "reference_nll",
    "history_nll",
    "prior_nll",
    "full_nll",
    "likelihood",
    "contrast_probability",
    "error_mask",
    "faulty_log_probability",
    "teacher_top_k",
    "teacher_sorted",
)
ROWS, LENGTH, VOCAB = 8, 16, 37

# A metric of e126dbc, and its name since samples are documents.
RENAMED = ("metric q_tuning_rows", "metric q_tuning_samples")


def cases(only: str = "") -> dict[str, dict[str, Any]]:
    """Name -> keys of the config."""
    found = {}
    for mode, keys in MODES.items():
        for name, hyper in WEIGHTINGS.items():
            section = {f"objective.{name}.{key}": value for key, value in hyper.items()}
            by = {"objective.normalisation": "all"} if name in SIGNED else {}
            found[f"{name} {mode}"] = {"objective.weighting": name} | section | by | keys
        for name, hyper in LOSSES.items():
            section = {f"objective.{name}.{key}": value for key, value in hyper.items()}
            average = {}
            if name in ("block_distillation", "self_distillation"):
                average = {"train.ema_decay": 0.5, "objective.references.teacher": "ema"}
            found[f"{name} {mode}"] = {"objective.loss": name} | section | average | keys
        z_loss = {"objective.z_loss": 0.1, "objective.weighting": "focal*uskd"}
        found[f"z_loss {mode}"] = z_loss | keys
        for by in ("all", "sequence"):
            sections = {"objective.normalisation": by, "objective.weighting": "dft"}
            found[f"normalisation {by} {mode}"] = sections | keys
    return {name: keys for name, keys in found.items() if only in name}


def run_cases(only: str, steps: int, perturb: float) -> dict[str, np.ndarray]:
    """Traces of all cases in the checkout of the current folder."""
    import jax

    from lm.training import experiment

    try:
        from lm.parallel.mesh import put_batch
    except ImportError:
        from lm.training.sharding import put_batch

    found = {}
    for name, keys in cases(only).items():
        config = toy_config(keys, perturb)
        devices = jax.devices()[: 8 if name.endswith("mesh") else 1]
        run = experiment.build(config, VOCAB, devices)
        with jax.set_mesh(run.mesh):
            shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state())
            state = jax.jit(run.init, out_shardings=shardings)(jax.random.key(0))
            step = run.train_step("quantized" in name)
            for i in range(steps):
                state, values = step(state, put_batch(run.mesh, toy_batch(i)))
                for metric, value in values.items():
                    found[f"{name}|metric {metric}|{i}"] = np.asarray(value)
            found[f"{name}|compiles|"] = np.asarray(step._cache_size())
            state = jax.device_get(state)
            for part in ("trained", "optimizer"):
                for i, leaf in enumerate(jax.tree.leaves(getattr(state, part))):
                    found[f"{name}|{part}|{i}"] = np.asarray(leaf)
        print(name, file=sys.stderr, flush=True)
    return found


def toy_config(keys: dict[str, Any], perturb: float) -> Any:
    """The defaults shrunk to a toy, with the keys of a case."""
    from configs import base

    c = base.get_config()
    c.model.update(layers=1, width=16, heads=2, kv_heads=2, mlp_width=32)
    c.data.update(sequence_length=LENGTH, packing="best_fit")
    c.train.update(steps=100, batch_size=ROWS)
    c.mesh.update(data=1, unsharded_tolerance=1.0)
    c.optimizer.update(warmup_steps=2)
    c.optimizer.peak_learning_rate *= 1 + perturb
    for name in set(STORED) & set(c.objective.references):  # Another commit may have fewer.
        c.objective.references[name] = "stored"
    for key, value in keys.items():
        *sections, name = key.split(".")
        section = c
        for part in sections:
            section = section[part]
        section[name] = value
    return c


def toy_batch(seed: int) -> dict[str, np.ndarray]:
    """Random tokens, one document a row, with uneven weights, some of them 0."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    weights = rng.uniform(0.1, 3.0, shape) * (rng.random(shape) > 0.2)
    samples = rng.permutation(64)[:ROWS].astype(np.int32)
    batch = {
        "tokens": rng.integers(0, VOCAB, shape).astype(np.int32),
        "targets": rng.integers(0, VOCAB, shape).astype(np.int32),
        "weights": weights.astype(np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape).copy(),
        "num_bytes": np.ones(shape, np.int32),
        "sample_ids": np.repeat(samples[:, None], LENGTH, 1),
        "sample_positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape).copy(),
    }
    for name in STORED:
        low, high = (2.0, 5.0) if name.endswith("nll") else (0.0, 1.0)
        batch[name] = rng.uniform(low, high, shape).astype(np.float32)
    # Five entries of a teacher at every token.
    del batch["teacher_top_k"]
    q = np.sort(rng.dirichlet(np.ones(6), shape).astype(np.float32)[..., :5])[..., ::-1]
    ids = np.argsort(rng.random((*shape, VOCAB)))[..., :5].astype(np.int32)
    batch |= {"teacher_sorted": q, "teacher_ids": ids, "teacher_log_probabilities": np.log(q)}
    return batch


def costs() -> dict[str, dict[str, float]]:
    """FLOPs, bytes and temporaries of the compiled plain step of two configs."""
    import jax

    from configs import base, quickstart
    from lm.data.layout import BATCH
    from lm.training import experiment

    found = {}
    for name, config in (("base", base.get_config()), ("quickstart", quickstart.get_config())):
        run = experiment.build(config, 257, jax.devices()[:1])
        shape = (config.train.batch_size, config.data.sequence_length)
        batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, dtype in BATCH.items()}
        with jax.set_mesh(run.mesh):
            compiled = run.train_step().lower(run.abstract_state(), batch).compile()
        analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
        found[name] = {
            "FLOPs": analysis["flops"],
            "bytes accessed": analysis["bytes accessed"],
            "temporaries": memory.temp_size_in_bytes,
        }
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Case -> largest difference relative to the largest entry of its array; 0 is identical.

    Raises:
      ValueError: `after` lacks what `before` has.
    """
    before = {key.replace(*RENAMED): value for key, value in before.items()}
    if missing := sorted(before.keys() - after.keys()):
        raise ValueError(f"missing after: {', '.join(missing[:5])} ({len(missing)} in all)")
    found: dict[str, float] = {}
    for key, old in before.items():
        case, kind, _ = key.split("|")
        new = after[key]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(f"{key}: {old.dtype}{old.shape} was, {new.dtype}{new.shape} is")
        if kind == "compiles":
            apart = np.inf if new > old else 0.0
        elif np.array_equal(old, new, equal_nan=old.dtype.kind == "f"):
            apart = 0.0
        else:
            old, new = (np.asarray(x, np.float64) for x in (old, new))
            apart = float(np.max(np.abs(new - old)) / (np.max(np.abs(old)) + 1e-9))
            apart = np.inf if np.isnan(apart) else apart
        found[case] = max(found.get(case, 0.0), apart)
    return found


def traces(checkout: Path, options: argparse.Namespace, output: Path) -> subprocess.Popen:
    """Starts the cases in a checkout, in a process of its own."""
    environment = dict(os.environ, PYTHONPATH=str(checkout), JAX_PLATFORMS="cpu")
    # Unoptimised machine code, the same on both sides: most of the time is that of the compiler.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment["XLA_FLAGS"] = flags
    arguments = ["--only", options.only, "--steps", str(options.steps), "--trace", str(output)]
    arguments += ["--perturb", str(options.perturb if checkout == ROOT else 0.0)]
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *arguments], cwd=checkout, env=environment
    )


def main() -> int:
    """Runs both checkouts at the same time and prints a line a case; 1 where one is too far off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", help="commit to compare with")
    parser.add_argument("--only", default="", help="only cases with this text in their name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep", help="folder of the traces; those of the reference are reused")
    parser.add_argument(
        "--perturb",
        type=float,
        default=0.0,
        help="negative control: change of the learning rate of this checkout, as a share",
    )
    parser.add_argument("--trace", help="used for the two processes")
    options = parser.parse_args()
    if options.trace:
        np.savez(options.trace, **run_cases(options.only, options.steps, options.perturb))
        Path(options.trace).with_suffix(".json").write_text(json.dumps(costs()))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        other = Path(scratch) / "reference"
        git = ["git", "-C", str(ROOT), "worktree"]
        started = [traces(ROOT, options, folder / "after.npz")]
        if not (folder / "before.npz").exists():
            add = [*git, "add", "--quiet", "--detach", str(other), options.reference]
            subprocess.run(add, check=True)
            started.append(traces(other, options, folder / "before.npz"))
        codes = [process.wait() for process in started]
        if other.exists():
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
        return 1 if any(codes) else report(folder)


def report(folder: Path) -> int:
    """Prints the comparison of the traces in a folder; 1 where something is too far off."""
    before, after = (dict(np.load(folder / f"{side}.npz")) for side in ("before", "after"))
    found = compare(before, after)
    for case, apart in found.items():
        shown = "identical" if apart == 0 else f"within {apart:.1e}"
        print(f"{case:32} {shown}{'  TOO FAR' * (apart > TOLERANCE)}")
    bad = [case for case, apart in found.items() if apart > TOLERANCE]
    sides = [json.loads((folder / f"{side}.json").read_text()) for side in ("before", "after")]
    for name, figures in sides[0].items():
        for what, old in figures.items():
            new = sides[1][name][what]
            more = new > old * NEUTRAL
            bad += [f"{name} {what}"] * more
            print(f"{name} {what}: {old:,.0f} before, {new:,.0f} after{'  MORE' * more}")
    identical = sum(apart == 0 for apart in found.values())
    print(f"{identical} of {len(found)} cases identical, {len(bad)} failures")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
