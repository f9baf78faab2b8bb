"""Losses of TRL's GRPO and their gradients on fixed log-probabilities, as goldens/trl_policy.json.

ORACLE_PYTHON tests/objectives/policy/make_policy_goldens.py FILE

ORACLE_PYTHON has torch and trl 1.16.0. The method of TRL's trainer is called with a stand-in for
the trainer, which gives log-probabilities and entropies in place of computing them.
"""

import collections
import json
import sys
import types

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

LENGTHS = (3, 5, 1, 4, 2, 6)
ADVANTAGES = (1.5, -0.5, -0.5, 0.7, -1.2, 0.9)
# The longest answer that is possible: what Dr. GRPO divides by.
LENGTH = 9
# Name -> (loss type, what else is not as TRL has it by default).
LOSSES = {
    "grpo": ("grpo", {}),
    "grpo kl": ("grpo", {"beta": 0.3}),
    "grpo dual": ("grpo", {"delta": 1.3}),
    "gspo": ("grpo", {"level": "sequence", "low": 0.02, "high": 0.03}),
    "bnpo": ("bnpo", {}),
    "dr_grpo": ("dr_grpo", {}),
    "dapo": ("dapo", {"high": 0.28}),
    "dapo entropy": ("dapo", {"entropy": 0.1}),
    "luspo": ("luspo", {"level": "sequence", "low": 0.02, "high": 0.03}),
    "cispo": ("cispo", {"high": 1.15}),
    "sapo": ("sapo", {}),
}


def main(path):
    """Writes the file."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return [low + (high - low) * torch.rand(n, generator=generator) for n in LENGTHS]

    given = {"log_p": draw(-2.5, -0.05), "entropy": draw(0.1, 1.5), "reference": draw(-2.5, -0.1)}
    given["behaviour"] = [x + d for x, d in zip(given["log_p"], draw(-0.4, 0.4), strict=True)]
    found = {}
    for name, (kind, options) in LOSSES.items():
        x = {key: [one.clone().requires_grad_() for one in value] for key, value in given.items()}
        value = loss(x, kind, **options)
        value.backward()
        slopes = [torch.zeros_like(one) if one.grad is None else one.grad for one in x["entropy"]]
        found[name] = {
            "loss": value.item(),
            "log_p": [one.grad.tolist() for one in x["log_p"]],
            "entropy": [one.tolist() for one in slopes],
        }
    given = {key: [one.tolist() for one in value] for key, value in given.items()}
    with open(path, "w") as file:
        json.dump({"given": given | {"advantages": ADVANTAGES}, "found": found}, file)
        file.write("\n")


def loss(x, kind, beta=0.0, delta=None, level="token", low=0.2, high=0.2, entropy=0.0):
    """A loss of TRL's GRPOTrainer."""
    log_p, mask = padded(x["log_p"])
    accelerator = types.SimpleNamespace(
        num_processes=1,
        sync_gradients=False,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    trainer = types.SimpleNamespace(
        accelerator=accelerator,
        args=types.SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=False,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        model=types.SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_p, padded(x["entropy"])[0], None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=kind,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        _entropy_bonus_enabled=bool(entropy),
        use_adaptive_entropy=False,
        entropy_coef=entropy,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    ones = torch.ones_like(mask)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": ones,
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": padded(x["behaviour"])[0].detach(),
        "ref_per_token_logps": padded(x["reference"])[0].detach(),
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def padded(arrays):
    """Arrays as one [N, T], and its mask."""
    width = max(map(len, arrays))
    rows = [torch.nn.functional.pad(x, (0, width - len(x))) for x in arrays]
    mask = [[1] * len(x) + [0] * (width - len(x)) for x in arrays]
    return torch.stack(rows), torch.tensor(mask)


if __name__ == "__main__":
    main(*sys.argv[1:])
