"""What is minimised; a config names one of `OBJECTIVES` in `objective.name`.

"weighted" is made of `objective.loss`, `objective.weighting` and `objective.z_loss`. Another takes
the section of its name as its hyper-parameters; one whose first argument is `base` extends the
weighted objective.
"""

# First: losses and distillation need each other.
from objectives import losses
from objectives.distillation.alm import alm
from objectives.objective import Head, Objective, Prepared
from objectives.policy import POLICY
from objectives.preference import PREFERENCE
from objectives.self_knowledge import self_knowledge
from objectives.weighted import weighted

OBJECTIVES = {
    "weighted": weighted,
    "self_knowledge": self_knowledge,
    "alm": alm,
    **PREFERENCE,
    **POLICY,
}

__all__ = ["OBJECTIVES", "Head", "Objective", "Prepared", "losses"]
