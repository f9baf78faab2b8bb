"""The runs of an ablation: one a variant and seed, and the short ones that measure speed."""

import hashlib
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lm import strict_json
from lm.flat import leaves
from lm.studies.ablation import RATES, Planned, variant_in


class Run(NamedTuple):
    """One variant with one seed.

    Attributes:
      planned: the variant.
      seed: of initialisation and data order.
      folder: its work directory.
      config: of its training, with paths for names in braces.
      needs: folders of the runs that must have ended.
      digest: of the config, the same on every machine and in every folder.
    """

    planned: Planned
    seed: int
    folder: Path
    config: ConfigDict
    needs: tuple[Path, ...]
    digest: str

    @property
    def name(self) -> str:
        """As it is shown: VARIANT/seed_SEED."""
        return "/".join(self.folder.parts[-2:])

    def record(self) -> dict[str, Any]:
        """What tells this run from another one in its folder, for JSON."""
        changes = self.planned.variant.changes
        content = {
            "variant": self.planned.variant.name,
            "seed": self.seed,
            "digest": self.digest,
            "config": self.config.to_dict(),
        }
        if self.planned.variant.quantizes:
            content["quantize"] = dict(changes)
        return strict_json.loads(strict_json.dumps(content))


def runs(planned: Mapping[str, Planned], seeds: tuple[int, ...], folder: Path) -> list[Run]:
    """All runs, seed by seed, each after those that it needs."""
    return [_run(one, seed, folder) for seed in seeds for one in planned.values()]


def _run(one: Planned, seed: int, folder: Path) -> Run:
    def place(name: str) -> Path:
        return folder / name / f"seed_{seed}"

    config = one.config.copy_and_resolve_references()
    config.train.seed = seed
    content = config.to_dict()
    # Where a run saves, caches and logs changes none of its numbers.
    content.pop("checkpoint")
    content["train"].pop("wandb_group")
    content["data"].pop("directory")
    identity = [content, dict(one.variant.changes) if one.variant.quantizes else {}]
    digest = hashlib.blake2b(strict_json.dumps(identity, sort_keys=True).encode(), digest_size=8)
    _substitute(config, place)
    config.train.wandb_group = config.train.wandb_group or folder.resolve().name
    needs = tuple(place(name) for name in one.variant.needs)
    return Run(one, seed, place(one.variant.name), config, needs, digest.hexdigest())


def _substitute(config: ConfigDict, place: Callable[[str], Path]) -> None:
    for key, value in list(leaves(config)):
        if isinstance(value, str) and variant_in(value):
            config.update_from_flattened_dict({key: str(place(variant_in(value)))})


def measuring_runs(planned: Mapping[str, Planned], folder: Path, steps: int = 40) -> list[Run]:
    """Short runs, one for each variant that is trained, with the speed of the variant.

    The share of quantized steps is that of the variant; nothing else that takes time is on. The
    schedule of the learning rate does not change the speed, and is constant.
    """
    found = []
    for one in planned.values():
        if one.variant.quantizes:
            continue
        config = one.config.copy_and_resolve_references()
        if one.switch < one.steps:
            config.quantization.fraction = f"{1 - one.switch / one.steps:.6f}"
        config.quantization.update(warmup_steps=0, fused_cooldown=False, gptq_batches=0)
        config.quantization["from"] = ""
        config.train.update(steps=steps, log_every=5, tensorboard=False, wandb_project="")
        config.optimizer.update(schedule="constant", warmup_steps=0)
        config.evaluation.update(every_steps=0, batches=1, sample_tokens=0, ngram_order=0)
        config.checkpoint.update(every_steps=0, every_minutes=0.0, at_steps=())
        run = _run(one._replace(config=config), config.train.seed, folder / RATES)
        found.append(run)
    return found


def estimate_seconds(
    planned: Mapping[str, Planned], rates: Mapping[str, float]
) -> dict[str, float | None]:
    """Seconds of one training of each variant; None where nothing has been measured.

    From the variant's own tokens per second, or else from the median FLOP/s of those measured.
    """
    speeds = [rates[name] * planned[name].flops_per_token for name in planned if name in rates]
    speed = statistics.median(speeds) if speeds else None

    def seconds(name: str, one: Planned) -> float | None:
        if one.variant.quantizes:
            return 0.0
        if name in rates:
            return one.tokens / rates[name]
        return one.flops / speed if speed else None

    return {name: seconds(name, one) for name, one in planned.items()}
