"""What a weighting or a loss compares with, and the sources that `objective.references` names."""

from ml_collections import ConfigDict

from lm.errors import InputError

# The source that is the run's own moving average.
EMA = "ema"
# The source that is the run's own frozen parameters without their adapters.
BASE = "base"

_LOSSES = ("ema", "base", "model", "scores")
_STORED = ("scores",)

# Name of a reference -> what its source may be: the moving average, the frozen model below the
# adapters, a frozen second model, or a folder of scores.
SOURCES = {
    "reference_nll": _LOSSES,
    "history_nll": _LOSSES,
    "prior_nll": _LOSSES,
    "full_nll": _LOSSES,
    "likelihood": _STORED,
    "contrast_probability": _STORED,
    "error_mask": _STORED,
    "faulty_log_probability": _STORED,
    "teacher": ("ema", "base", "model"),
    "contrast_teacher": ("ema", "base", "model"),
    "teacher_top_k": _STORED,
    "teacher_sorted": _STORED,
    "chunk_log_probability": _STORED,
    "reward_nll": _LOSSES,
    "better_nll": _STORED,
    "worse_nll": _STORED,
    "desirable_probability": _STORED,
}

# Name of a reference -> the arrays that are stored for it, where these have other names.
_ARRAYS = {"teacher_top_k": ("teacher_ids", "teacher_log_probabilities")}

# Those that are losses of a model.
LOSSES = tuple(name for name in SOURCES if name.endswith("_nll"))

_KINDS = {
    "ema": "'ema' with train.ema_decay above 0",
    "base": "'base' with model.adapter_rank above 0 and train.trainable=''",
    "model": "a work directory, a Hugging Face folder, a .gguf file",
    "scores": "a folder of launch.score",
}


def stored_arrays(name: str) -> tuple[str, ...]:
    """What a batch holds of a reference that is stored; see `lm.data.scores`."""
    return _ARRAYS.get(name, (name,))


def check_sources(config: ConfigDict, user: str, names: tuple[str, ...]) -> None:
    """Refuses references without a source, as far as it can be told without looking at files.

    Args:
      config: of the run.
      user: what needs the references, as `objective.weighting='rho1'`.
      names: of the references.

    Raises:
      InputError: names the key, and what would be valid.
    """
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise InputError(
            f"{user} needs the reference {' and '.join(unknown)}, which no run can provide"
        )
    for name in names:
        source, key = config.objective.references[name], f"objective.references.{name}"
        if not source:
            raise InputError(f"{user} needs {key}; valid: {valid_sources(name)}")
        own = {
            EMA: config.train.ema_decay > 0,
            BASE: config.model.adapter_rank > 0 and not config.train.trainable,
        }
        if source in own and (source not in SOURCES[name] or not own[source]):
            raise InputError(f"{key}={source!r} is not possible; valid: {valid_sources(name)}")


def valid_sources(name: str, stored: bool = True) -> str:
    """The sources of a reference in words; without `stored`, "" where it can only be stored."""
    return ", ".join(_KINDS[kind] for kind in SOURCES[name] if stored or kind not in _STORED)
