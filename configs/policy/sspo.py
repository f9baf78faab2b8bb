"""SSPO (arXiv 2511.04256): one ratio a sentence.

Before:  python -m launch.train --config=configs/sums.py --workdir=runs/sums
Command: python -m launch.train --config=configs/policy/sspo.py --workdir=runs/sspo
Against: python -m launch.train --config=configs/policy/grpo.py --workdir=runs/grpo
Cost:    that of configs/policy/grpo.py.

Claim: between one ratio a token, which is noise, and one an answer, which throws whole answers
away, stands one a sentence. The rule for its bounds is UNCONFIRMED: there are none here. The
paper's tables have not been checked here.

Watch `ratio_max`. Answers of this task are one sentence, so that this is GSPO without bounds; set
objective.sspo.sentence_ends for others.
"""

from ml_collections import ConfigDict

from configs.policy import grpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return grpo.start("sspo")
