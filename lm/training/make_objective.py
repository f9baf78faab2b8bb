"""From the `objective` section of a config to its functions."""

import inspect

from ml_collections import ConfigDict

from lm.data.layout import BATCH, POLICY
from lm.data.pairs import KEYS, MISMATCHED, Reading
from lm.errors import InputError
from lm.model.config import check_choice
from lm.references.sources import check_sources, stored_arrays
from objectives import OBJECTIVES, Objective
from objectives.losses import LOSSES, Loss
from objectives.weighted import weighted
from objectives.weighting import NORMALISATIONS, WEIGHTINGS, Weighting, chain, normalise


def make_objective(config: ConfigDict) -> Objective:
    """The objective that `objective.name` names, with the hyper-parameters of its section.

    Raises:
      InputError: an unknown name, a bad hyper-parameter, or an objective that needs what a run of
        this config cannot give it.
    """
    c = config.objective
    check_choice("objective.name", c.name, tuple(OBJECTIVES))
    weighting = make_weighting(config)
    base = weighted(make_loss(config, weighting), weighting, c.z_loss)
    if c.name == "weighted":
        return base
    factory, hyper = OBJECTIVES[c.name], c[c.name].to_dict() if c.name in c else {}
    arguments = inspect.signature(factory).parameters
    extends = "base" in arguments
    if not extends and (c.weighting, c.loss, c.z_loss) != ("uniform", "cross_entropy", 0.0):
        raise InputError(
            f"objective.name={c.name!r} is no weighted mean of losses; valid beside it: "
            "objective.weighting='uniform', objective.loss='cross_entropy', objective.z_loss=0"
        )
    if "sampling_temperature" in arguments:
        hyper["sampling_temperature"] = _sampling_temperature(config)
    try:
        objective = factory(base, **hyper) if extends else factory(**hyper)
    except ValueError as error:
        raise InputError(f"objective.{c.name}.{error}") from None
    user = f"objective.name={c.name!r}"
    if config.model.logit_softcap and not (extends or objective.loss.softcapped):
        raise InputError(
            f"{user} draws tokens with temperatures of their own (objective.{c.name}."
            f"temperature_tau), which logits under model.logit_softcap={config.model.logit_softcap}"
            " do not have; valid: 0 of either"
        )
    _check_needs(config, user, objective)
    if objective.teachers:
        check_sources(config, user, objective.teachers)
    return objective


def _sampling_temperature(config: ConfigDict) -> float:
    """That of the answers which a policy gradient learns from, `rollouts.temperature`.

    Raises:
      InputError: it is 0, where nothing is drawn.
    """
    if config.rollouts.temperature <= 0:
        raise InputError(
            f"objective.name={config.objective.name!r} learns from answers that are drawn: "
            f"rollouts.temperature={config.rollouts.temperature} must be above 0"
        )
    return config.rollouts.temperature


def preference_reading(config: ConfigDict, objective: Objective) -> Reading | None:
    """How the objective reads preference data; None where it reads documents."""
    if not set(KEYS) & set(objective.batch_keys):
        return None
    mismatched = MISMATCHED in objective.batch_keys
    user = f"objective.name={config.objective.name!r}"
    return Reading(user, objective.unpaired or mismatched, mismatched)


def make_weighting(config: ConfigDict) -> Weighting:
    """The product of the weightings named by `objective.weighting`, normalised as it says.

    Raises:
      InputError: an unknown name, a bad hyper-parameter, or a weighting that needs what a run of
        this config cannot give it.
    """
    c = config.objective
    names = weighting_names(config)
    members = []
    for name in names:
        check_choice("objective.weighting", name, tuple(WEIGHTINGS))
        if names.count(name) > 1:
            raise InputError(f"objective.weighting={c.weighting!r} names {name!r} twice")
        hyper = c[name].to_dict() if name in c else {}
        try:
            weighting = WEIGHTINGS[name](**hyper)
        except ValueError as error:
            raise InputError(f"objective.{name}.{error}") from None
        _check_needs(config, f"objective.weighting={name!r}", weighting)
        members.append(weighting)
    check_choice("objective.normalisation", c.normalisation, NORMALISATIONS)
    try:
        return normalise(chain(*members), c.normalisation)
    except ValueError:
        raise InputError(
            f"objective.normalisation={c.normalisation!r} would cancel the negative weights of "
            f"objective.weighting={c.weighting!r}; valid: 'all'"
        ) from None


def weighting_names(config: ConfigDict) -> list[str]:
    """The weightings that `objective.weighting` multiplies."""
    return [name.strip() for name in config.objective.weighting.replace("*", ",").split(",")]


def describe_weighting(config: ConfigDict) -> str:
    """The weightings with their hyper-parameters and the normalisation, in one line."""
    c = config.objective
    members = []
    for name in weighting_names(config):
        hyper = c[name].to_dict() if name in c else {}
        members.append(f"{name}({', '.join(f'{key}={value}' for key, value in hyper.items())})")
    return f"{' * '.join(members)}, normalisation {c.normalisation}"


def describe_objective(config: ConfigDict) -> str:
    """The objective with its hyper-parameters, in one line."""
    c = config.objective
    hyper = c[c.name].to_dict() if c.name in c else {}
    return f"{c.name}({', '.join(f'{key}={value}' for key, value in hyper.items())})"


def make_loss(config: ConfigDict, weighting: Weighting) -> Loss:
    """The loss named by `objective.loss`.

    Raises:
      InputError: an unknown name, a bad hyper-parameter, a loss that needs what a run of this
        config cannot give it, or that does not go with the model or the weighting.
    """
    c = config.objective
    check_choice("objective.loss", c.loss, tuple(LOSSES))
    hyper = c[c.loss].to_dict() if c.loss in c else {}
    try:
        loss = LOSSES[c.loss](**hyper)
    except ValueError as error:
        raise InputError(f"objective.{c.loss}.{error}") from None
    if config.model.logit_softcap and not loss.softcapped:
        raise InputError(
            f"objective.loss={c.loss!r} has no logits that model.logit_softcap="
            f"{config.model.logit_softcap} could bound; valid: 0"
        )
    if loss.reduce and weighting.signed:
        raise InputError(
            f"objective.loss={c.loss!r} is a ratio of sums, and objective.weighting="
            f"{c.weighting!r} has negative weights; valid: weightings that are not negative"
        )
    needed = (*loss.references, *loss.teachers)
    check_sources(config, f"objective.loss={c.loss!r}", needed)
    return loss


def _check_needs(config: ConfigDict, user: str, needs: Weighting | Objective) -> None:
    """Raises InputError, naming what is missing; `user` is the key that asks for it."""
    # Random keys are made in the step, references may be stored with the data.
    stored = (array for name in needs.references for array in stored_arrays(name))
    known = (*BATCH, "keys", *stored)
    if isinstance(needs, Objective):
        known += KEYS if needs.advantages is None else tuple(POLICY)
    if missing := [key for key in needs.batch_keys if key not in known]:
        raise InputError(
            f"{user} needs {' and '.join(missing)} in every batch, which the data of a run does "
            "not have"
        )
    if set(KEYS) & set(needs.batch_keys):
        if config.data.packing != "best_fit":
            raise InputError(
                f"{user} needs the answers of a record in one row: data.packing='best_fit', not "
                f"{config.data.packing!r}"
            )
        if config.data.corrupted:
            raise InputError(f"{user} needs answers as they are: data.corrupted=0")
    check_sources(config, user, needs.references)
