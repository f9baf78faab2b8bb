"""Records and checkpoints of older commits, in the form that the code of today reads.

The one table of what has changed: a new key is in `ADDED`, with what the code did before, a key
with another name in `RENAMED`, a value with another name in `VALUES`, a field of the train state in
`STATE`.
"""

from collections.abc import Mapping
from typing import Any

from lm.flat import leaves

# Of config.json; a record without "format" has format 1 and may be older still.
FORMAT = 2

# Key -> what the code did before it was there, oldest first. Hyper-parameters of a method that came
# with the method are not here: a run from before did not use them.
ADDED = {
    # Before format 1.
    "model.accept_aliasing": False,
    "model.code_bits": 0,
    "model.code_head": False,
    "model.code_layout": "tile",
    "model.code_scale": 1.0,
    "model.code_seed": 0,
    "model.code_signs": "none",
    "model.code_values": "zero_one",
    "model.embedding_rank": 32,
    "objective.normalisation": "kept",
    "objective.loss": "cross_entropy",
    "objective.references.reference_nll": "",
    "objective.references.history_nll": "",
    "objective.references.prior_nll": "",
    "objective.references.full_nll": "",
    "objective.references.likelihood": "",
    "objective.references.contrast_probability": "",
    "objective.references.error_mask": "",
    "objective.references.faulty_log_probability": "",
    "objective.references.teacher": "",
    "quantization.bits": 16.0,
    "quantization.quantizer": "paretoq",
    "quantization.granularity": "",
    "quantization.group_size": 0,
    "quantization.activations": "none",
    "quantization.fraction": "optimal",
    "quantization.fused_cooldown": True,
    "quantization.warmup_steps": 20,
    "quantization.peak_factor": 1.0,
    "quantization.reset_optimizer": False,
    "quantization.from": "",
    "quantization.gptq_batches": 8,
    "quantization.relative_scale_steps": False,
    "quantization.outer_bits": 4.0,
    "quantization.begin_with": "weights",
    "checkpoint.at_steps": (),
    "data.corrupted": 0.0,
    "data.streams": 0,
    "distributed.processes": 0,
    "distributed.join_seconds": 300,
    "distributed.heartbeat_seconds": 100,
    "mesh.unsharded_tolerance": 0.02,
    # Format 2.
    "checkpoint.grace_seconds": 10.0,
    "data.beginning_of_text": "guessed",
    "data.end_of_text": "guessed",
    "model.plain_autodiff": False,
    "objective.name": "weighted",
    "optimizer.extended_from": (),
    "train.wandb_group": "",
    "quantization.scale_rate": 1.0,
    "quantization.begin_unrounded": False,
    # With models from outside.
    "initialise.from": "",
    "initialise.family": "",
    "model.adapter_alpha": 16.0,
    "model.adapter_dropout": 0.0,
    "model.adapter_matrices": "",
    "model.adapter_rank": 0,
    "train.trainable": "",
    "train.frozen": "as_is",
    "model.attention_bias": "none",
    "model.attention_scale": 0.0,
    "model.attention_softcap": 0.0,
    "model.embedding_scale": 0.0,
    "model.head_width": 0,
    "model.layer_pattern": "G",
    "model.local_rope_base": 0.0,
    "model.max_positions": 1024,
    "model.mlp_bias": False,
    "model.norm_epsilon": 1e-06,
    "model.norm_offset": 0.0,
    "model.norm_placement": "before",
    "model.parallel_block": False,
    "model.positions": "rotary",
    "model.qk_norm_scope": "head",
    "model.rope_factor": 1.0,
    "model.rope_high_frequency": 4.0,
    "model.rope_low_frequency": 1.0,
    "model.rope_original_length": 8192,
    "model.rope_scaling": "none",
    "model.rope_share": 1.0,
    "model.window": 0,
    # With widths of single layers.
    "quantization.widths": "",
    "quantization.adapt_batches": 1,
    "quantization.adapt_bytes": 0,
    "quantization.adapt_every": 0,
    "quantization.adapt_weighting": 1.0,
    "quantization.adapt_widths": [2, 3, 4, 8],
    # With a quantized cache.
    "quantization.cache": "none",
    "quantization.cache_batches": 8,
    # With preferences.
    "objective.references.reward_nll": "",
    "objective.references.better_nll": "",
    "objective.references.worse_nll": "",
    "objective.references.desirable_probability": "",
    # With equivalent models of quantization after training.
    "model.norm_bias": False,
    # With distillation from two teachers.
    "objective.references.contrast_teacher": "",
    # With teachers that are stored.
    "objective.references.teacher_top_k": "",
    "objective.references.teacher_sorted": "",
    "objective.references.chunk_log_probability": "",
    # With text that the model writes itself.
    "rollouts.prompt_tokens": 0,
    "rollouts.share": 0.0,
    "rollouts.temperature": 1.0,
    "rollouts.tokens": 64,
    # With policy gradients.
    "evaluation.problems": 0,
    "rollouts.dynamic": 0,
    "rollouts.group": 0,
    "rollouts.longest_prompt": 0,
    "rollouts.reuse": 1,
    "rollouts.top_p": 1.0,
    # With rewards of sampled answers.
    "rollouts.reward_seconds": 2.0,
    "rollouts.reward_weights": [],
    "rollouts.rewards": "exact",
    # With answers of rounded weights.
    "rollouts.bits": 16.0,
    # With temperatures by entropy.
    "objective.hapo.advantage": "group_normalised",
    "objective.hapo.temperature_tau": 0.0,
    # With tasks.
    "evaluation.tasks": "",
    # With options of the compiler for each kind of device; before, CPUs alone had theirs.
    "train.compiler_options": "auto",
}

# Old key -> its name today, "" where it is gone.
RENAMED = {
    "objective.rho1.reference_name": "",
    "objective.prior.reference_name": "",
    "objective.block_sensitive.reference_name": "",
    "objective.critical_token.reference_name": "",
    "objective.frequency_equity.reference_name": "",
    "objective.ss_token.history": "",
    "objective.self_distillation.share": "objective.distillation.share",
}

# Key -> old value -> its name today.
VALUES = {"objective.loss": {"self_distillation": "distillation"}}

# Field of the train state -> its name in checkpoints of format 1.
STATE = {"objective": "weighting"}


def upgrade(record: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json, of any format, as this code would have written it.

    Raises:
      ValueError: the record is of a newer format than this code knows.
    """
    if record.get("format", 1) > FORMAT:
        raise ValueError(f"format {record['format']} is newer than {FORMAT}, the one that is known")
    config = upgrade_config(record["config"])
    upgraded = {**record, "format": FORMAT, "config": config}
    if "must_match" not in record:
        upgraded["must_match"] = _must_match(record, dict(leaves(config)))
    return upgraded


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a recorded config with the keys of today."""
    flat = dict(leaves(config))
    for old, new in RENAMED.items():
        if old in flat:
            value = flat.pop(old)
            if new:
                flat[new] = value
    for key, names in VALUES.items():
        if key in flat:
            flat[key] = names.get(flat[key], flat[key])
    return _nested({**ADDED, **flat})


def _must_match(record: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, str]:
    """What format 1 said of the predicted distribution and of the weighting's state."""
    prediction = record.get("prediction", "softmax")
    details = {
        "tempnet": f"tempnet, width {flat.get('objective.tempnet.width')}",
        "harmonic": f"harmonic, distance {flat.get('objective.harmonic.distance')}",
    }
    return {
        "prediction": details.get(prediction, prediction),
        "state": record.get("weighting_state", "()"),
    }


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return tree
