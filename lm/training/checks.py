"""Checks of a config that need no functions of it."""

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lm.compression.phases import is_on
from lm.compression.widths import FULL_PRECISION
from lm.errors import InputError
from lm.model import splash
from lm.model.config import ModelConfig
from objectives import Objective


def check_adaptation(config: ConfigDict) -> None:
    """Raises InputError where widths cannot change during training."""
    if not config.quantization.adapt_every:
        return
    if config.quantization.bits >= FULL_PRECISION:
        raise InputError("quantization.adapt_every needs widths to begin with: quantization.bits=4")
    if jax.process_count() > 1:
        raise InputError("quantization.adapt_every is for one process")
    if not config.quantization.adapt_weighting:
        return
    needed = {"optimizer.name": "adamw", "train.trainable": "", "model.adapter_rank": 0}
    for key, value in needed.items():
        section, name = key.split(".")
        if config[section][name] != value:
            raise InputError(
                "quantization.adapt_every needs the moments of AdamW for every matrix: "
                f"{key}={value!r}, or quantization.adapt_weighting=0, which needs none"
            )


def check_mask_token(config: ConfigDict, vocab_size: int) -> None:
    """Raises InputError for a token to replace others with that the vocabulary lacks."""
    name = config.objective.name
    hyper = config.objective.get(name, {})
    if hyper.get("mask_token", -1) >= vocab_size:
        raise InputError(
            f"objective.{name}.mask_token={hyper.mask_token} must be below the {vocab_size} "
            "entries of the vocabulary"
        )


def check_splash(model: ModelConfig, mesh: Mesh | AbstractMesh, length: int) -> None:
    """Raises InputError where the kernel cannot be had."""
    reason = splash.refusal(length, model.heads, model.kv_heads, model.head_width, dict(mesh.shape))
    device = mesh.abstract_mesh.abstract_device if isinstance(mesh, Mesh) else None
    if device and device.platform != "tpu":
        reason = "it runs on TPUs only"
    if reason:
        raise InputError(f"model.attention=splash: {reason}; model.attention=auto finds its way")


def check_rollouts(config: ConfigDict, objective: Objective) -> None:
    """Raises InputError where a model cannot learn from text that it writes itself."""
    c, length = config.rollouts, config.data.sequence_length
    if not 0 < c.top_p <= 1:
        raise InputError(f"rollouts.top_p={c.top_p} must be above 0 and at most 1")
    _check_policy(config, objective)
    if not c.share:
        return
    if c.share > 1:
        raise InputError(f"rollouts.share={c.share} must be at most 1")
    if c.tokens >= length or c.prompt_tokens + c.tokens > length:
        raise InputError(
            f"rollouts.tokens={c.tokens} and rollouts.prompt_tokens={c.prompt_tokens} leave no "
            f"room for a prompt in data.sequence_length={length}; valid: at most {length} "
            "together, and a token or more for the prompt"
        )
    user = f"objective.name={config.objective.name!r}, loss={config.objective.loss!r}"
    reason = "" if objective.teachers else "has no teacher to say what is right of it"
    if further := sorted(set(objective.batch_keys) - {"keys"}):
        reason = f"reads {' and '.join(further)}, which only data has"
    if reason:
        raise InputError(
            f"rollouts.share={c.share}: the model trains on what it writes, and {user} {reason}; "
            "valid: objective.loss='distillation' with a model as its teacher"
        )


def _check_policy(config: ConfigDict, objective: Objective) -> None:
    """Raises InputError unless answers are drawn for a policy gradient, and for that alone."""
    c, length = config.rollouts, config.data.sequence_length
    user = f"objective.name={config.objective.name!r}"
    if objective.advantages is None:
        for key, off in (("group", 0), ("reuse", 1), ("dynamic", 0), ("bits", FULL_PRECISION)):
            if c[key] != off:
                raise InputError(
                    f"rollouts.{key}={c[key]} is for a policy gradient, and {user} is none; "
                    f"valid: {off}"
                )
        return
    if c.group < 1:
        raise InputError(
            f"rollouts.group={c.group}: {user} learns from answers that are drawn; valid: 1 or "
            "more answers to each prompt"
        )
    if c.share:
        raise InputError(
            f"rollouts.share={c.share}: {user} draws all that it learns from; valid: 0, which "
            "others are for"
        )
    if c.bits < FULL_PRECISION and is_on(config.quantization):
        raise InputError(
            f"rollouts.bits={c.bits:g} rounds weights that are trained in full precision, and the "
            "quantization section is on; valid: 16, with which answers are drawn as it says"
        )
    if c.dynamic and c.group < 2:
        raise InputError(
            f"rollouts.dynamic={c.dynamic} replaces groups of equal rewards, as all groups of "
            f"rollouts.group={c.group} are; valid: 0, or a larger group"
        )
    if objective.measures and config.train.accumulation > 1:
        raise InputError(
            f"train.accumulation={config.train.accumulation}: {user} compares the answers of a "
            "group, which micro-batches take apart; valid: 1"
        )
    if c.tokens > length:
        raise InputError(
            f"rollouts.tokens={c.tokens} leaves no room for a prompt in "
            f"data.sequence_length={length}"
        )
    if c.longest_prompt + c.tokens - 1 > length:
        raise InputError(
            f"rollouts.longest_prompt={c.longest_prompt} and rollouts.tokens={c.tokens} do not fit "
            f"into data.sequence_length={length}; valid: at most {length + 1} together"
        )


# Key -> smallest valid value, for the keys that no other module checks.
_MINIMA = {
    "train.steps": 1,
    "train.max_skips": 1,
    "train.log_every": 1,
    "train.ema_decay": 0,
    "train.spike_factor": 0,
    "data.shuffle_rows": 1,
    "data.workers": 0,
    "objective.z_loss": 0,
    "objective.block_size": 0,
    "rollouts.share": 0,
    "rollouts.temperature": 0,
    "rollouts.tokens": 1,
    "rollouts.prompt_tokens": 0,
    "rollouts.dynamic": 0,
    "rollouts.group": 0,
    "rollouts.longest_prompt": 0,
    "rollouts.reuse": 1,
    "rollouts.top_p": 0,
    "rollouts.reward_seconds": 0.01,
    "checkpoint.every_steps": 0,
    "checkpoint.every_minutes": 0,
    "checkpoint.grace_seconds": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "evaluation.every_steps": 0,
    "evaluation.batches": 0,
    "evaluation.sample_tokens": 0,
    "evaluation.ngram_order": 0,
    "evaluation.problems": 0,
    "quantization.gptq_batches": 0,
    "quantization.scale_rate": 0,
    "quantization.adapt_batches": 1,
    "quantization.adapt_bytes": 0,
    "quantization.adapt_every": 0,
    "quantization.adapt_weighting": 0,
    "quantization.cache_batches": 0,
}


def check_numbers(config: ConfigDict) -> None:
    """Raises InputError for a number below its smallest valid value."""
    for key, least in _MINIMA.items():
        section, name = key.split(".")
        if config[section][name] < least:
            raise InputError(f"{key}={config[section][name]} must be at least {least}")
    if config.train.ema_decay >= 1:
        raise InputError(f"train.ema_decay={config.train.ema_decay} must be below 1 (0 is off)")
