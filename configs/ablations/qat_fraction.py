"""How much of a run to quantize? (arXiv 2509.22935: more than 10% where there are many tokens)

Command: python -m launch.ablate --config=configs/ablations/qat_fraction.py:BITS,STEPS --workdir=DIR
Cost:    15 runs of 15 seconds (200 steps), 20 (800) or 40 (3200) on one CPU core.

BITS is 2 or 4, STEPS the budget: 200, 800 and 3200 are 10, 40 and 159 tokens a parameter. The
variant `optimal` has the share that the paper's closed form plans. The learning rate decays in both
phases, as in the paper's plain recipe, so that nothing of a run is shared.
"""

from ml_collections import ConfigDict

from configs import ablation, small


def get_config(argument: str = "4,800") -> ConfigDict:
    """Returns the ablation of "BITS,STEPS"."""
    bits, steps = argument.split(",")
    config = small.get_config("tiny")
    config.train.steps = int(steps)
    config.evaluation.every_steps = int(steps) // 4
    config.quantization.update(bits=float(bits), fused_cooldown=False, warmup_steps=5)
    shares = {f"fraction={x}": {"quantization.fraction": x} for x in ("0.1", "0.2", "0.4", "0.7")}
    variants = ablation.chain(shares, {"optimal": {"quantization.fraction": "optimal"}})
    return ablation.make(config, variants, seeds=(0, 1, 2), baseline="fraction=0.1")
