"""Losses of TRL and their gradients on fixed log-probabilities, as goldens/trl.json.

ORACLE_PYTHON tests/objectives/preference/make_preference_goldens.py FILE

ORACLE_PYTHON has torch and trl 1.16.0. The methods of TRL's trainers are called with a stand-in for
the trainer and for the model, which gives log-probabilities in place of computing them.
"""

import collections
import contextlib
import json
import sys
import types

import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

LENGTHS = ((3, 2), (1, 4), (5, 5), (2, 1), (4, 3))
BETA, LABEL_SMOOTHING = 0.3, 0.2


def main(path):
    """Writes the file."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)

    def draw(column):
        return [-3 * torch.rand(n[column], generator=generator) - 0.01 for n in LENGTHS]

    given = {
        "chosen": draw(0),
        "rejected": draw(1),
        "mismatched": draw(0),
        "reference_chosen": draw(0),
        "reference_rejected": draw(1),
        # Less likely, so that KTO's reference point is above 0.
        "reference_mismatched": [x - 1.0 for x in draw(0)],
    }
    losses = {
        "dpo": lambda x: dpo(x, "sigmoid"),
        "dpo robust": lambda x: dpo(x, "robust"),
        "dpo length_normalised": lambda x: dpo(x, "sigmoid_norm"),
        "ipo length_normalised": lambda x: dpo(x, "ipo"),
        "bco first pair": lambda x: dpo(x, "bco_pair"),
        "kto": lambda x: kto(x, "kto"),
        "kto zero": lambda x: kto(x, "apo_zero_unpaired"),
        "orpo": orpo,
        "simpo": lambda x: cpo(x, "simpo"),
        "cpo": lambda x: cpo(x, "sigmoid"),
    }
    found = {}
    for name, loss in losses.items():
        x = {key: [one.clone().requires_grad_() for one in value] for key, value in given.items()}
        value = loss(x)
        value.backward()
        grads = {
            side: [torch.zeros_like(one) if one.grad is None else one.grad for one in x[side]]
            for side in ("chosen", "rejected")
        }
        found[name] = {"loss": value.item(), **{k: as_lists(v) for k, v in grads.items()}}
    record = {"given": {k: as_lists(v) for k, v in given.items()}, "found": found}
    with open(path, "w") as file:
        json.dump(record, file)
        file.write("\n")


def as_lists(arrays):
    """Arrays as lists of numbers."""
    return [x.tolist() for x in arrays]


def sums(arrays):
    """The sum over every answer."""
    return torch.stack([x.sum() for x in arrays])


def means(arrays):
    """The mean over every answer."""
    return torch.stack([x.mean() for x in arrays])


def padded(arrays):
    """Log-probabilities [N, T] and their mask [N, T + 1], which has a prompt of one token."""
    width = max(map(len, arrays))
    rows = [torch.nn.functional.pad(x, (0, width - len(x))) for x in arrays]
    mask = [[0] + [1] * len(x) + [0] * (width - len(x)) for x in arrays]
    return torch.stack(rows), torch.tensor(mask)


def stand_in(**attributes):
    """What the methods read of a trainer."""
    accelerator = types.SimpleNamespace(
        device="cpu",
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        unwrap_model=lambda x: x,
    )
    return types.SimpleNamespace(
        accelerator=accelerator,
        model=types.SimpleNamespace(training=True),
        beta=BETA,
        label_smoothing=LABEL_SMOOTHING,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def answering(log_probs):
    """A model that gives these log-probabilities."""
    outputs = types.SimpleNamespace(
        log_probs=log_probs,
        entropy=torch.zeros_like(log_probs),
        mean_logits=torch.zeros_like(log_probs),
        is_top1=torch.zeros_like(log_probs, dtype=torch.bool),
    )
    return lambda **arguments: outputs


def inputs(mask):
    """The part of a batch that both trainers read."""
    ones = torch.ones_like(mask)
    return {"input_ids": ones, "attention_mask": ones, "completion_mask": mask}


def dpo(x, loss_type):
    """A loss of TRL's DPOTrainer."""
    trainer = stand_in(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        _is_vision_dataset=False,
    )
    log_probs, mask = padded(x["chosen"] + x["rejected"])
    batch = inputs(mask) | {
        "ref_chosen_logps": sums(x["reference_chosen"]).detach(),
        "ref_rejected_logps": sums(x["reference_rejected"]).detach(),
    }
    return DPOTrainer._compute_loss(trainer, answering(log_probs), batch, False)


def kto(x, loss_type):
    """A loss of TRL's KTOTrainer; the first answers are wanted."""
    trainer = stand_in(
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        desirable_weight=1.5,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda model, batch: sums(x["mismatched"]).detach(),
    )
    log_probs, mask = padded(x["chosen"] + x["rejected"])
    count = len(LENGTHS)
    batch = inputs(mask) | {
        "label": torch.tensor([True] * count + [False] * count),
        "ref_logps": sums(x["reference_chosen"] + x["reference_rejected"]).detach(),
        "ref_KL_logps": sums(x["reference_mismatched"]).detach(),
    }
    return KTOTrainer._compute_loss(trainer, answering(log_probs), batch, False)


def orpo(x):
    """TRL's odds ratio, and the likelihood of the chosen tokens as its trainer adds it."""
    trainer = stand_in()
    with in_float64():
        ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, means(x["chosen"]), means(x["rejected"]))
    return -torch.cat(x["chosen"]).mean() - ratio.mean()


@contextlib.contextmanager
def in_float64():
    """TRL rounds the arguments of the odds to float32."""
    rounded = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    yield
    torch.Tensor.float = rounded


def cpo(x, loss_type):
    """TRL's loss, and the likelihood of the chosen tokens as its trainer adds it to CPO."""
    trainer = stand_in(loss_type=loss_type, alpha=0.0, simpo_gamma=0.4)
    reduced = means if loss_type == "simpo" else sums
    losses, *_ = CPOTrainer.cpo_loss(trainer, reduced(x["chosen"]), reduced(x["rejected"]))
    nll = 0.0 if loss_type == "simpo" else -0.6 * torch.cat(x["chosen"]).mean()
    return losses.mean() + nll


if __name__ == "__main__":
    main(*sys.argv[1:])
