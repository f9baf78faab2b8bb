"""On-policy distillation: half of the steps on what the student itself writes (arXiv 2306.13649).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/distillation/on_policy.py:runs/quickstart
         --workdir=runs/on_policy
Against: python -m launch.train --config=configs/distillation/jensen_shannon.py:runs/quickstart
         --workdir=runs/jensen_shannon
Cost:    that of the run above, and in half of the steps 64 passes over one token of every row, one
         after the other.

Claim: a student that is compared with its teacher on its own text learns where it goes wrong when
it writes, which text of the data does not show. The paper's tables, of pretrained models that
translate, summarise and reason, have not been checked here. The text of the quickstart has no
prompts: the first 64 tokens of a row are one, and the student writes the 64 tokens that follow.
With a corpus of prompts and responses, rollouts.prompt_tokens=0.
"""

from ml_collections import ConfigDict

from configs.distillation import jensen_shannon


def get_config(teacher: str = "runs/quickstart") -> ConfigDict:
    """Returns the config for a teacher."""
    config = jensen_shannon.get_config(teacher)
    config.rollouts.update(share=0.5, tokens=64, prompt_tokens=64)
    return config
