"""SimPO (arXiv 2405.14734): the mean log-probability of a token as reward, and no reference.

Before:  the data of configs/answers.py, and
         python -m launch.train --config=configs/answers.py --workdir=runs/noisy
         --config.data.corpus=runs/noisy.jsonl
Command: python -m launch.train --config=configs/preference/simpo.py --workdir=runs/simpo
         python -m launch.evaluate --model=runs/simpo --corpus=runs/right.jsonl
Against: python -m launch.evaluate --model=runs/noisy --corpus=runs/right.jsonl
Cost:    about 3 minutes on 2 CPU cores, most of it before.

Claim: what generation maximises is the mean log-probability of a token; as a reward, with a margin
that is aimed at, it does better than that of DPO, without a reference. The paper's tables have not
been checked here.

Answers of these data are as long as each other; on others the means are what keeps answers short.
"""

from ml_collections import ConfigDict

from configs.preference import dpo


def get_config() -> ConfigDict:
    """Returns the config."""
    return dpo.without_reference("simpo")
