"""Section `rollouts`: batches of what the model itself writes.

They are for a loss with a teacher (GKD, arXiv 2306.13649), or for a policy gradient. The
hyper-parameters of rewards are those of their factories, each in a section `rollouts.NAME`.
"""

ROLLOUTS = {
    "share": (
        0.0,
        "probability that a step trains on the model's own answers to the prompts of its batch; 0 "
        "is off",
    ),
    "tokens": (64, "longest answer; a prompt keeps its last sequence_length - tokens"),
    "temperature": (1.0, "of the model that writes; 0 takes the most likely token"),
    "prompt_tokens": (
        0,
        "in rows without a document that has a prompt, first tokens that are one; 0: none",
    ),
    "top_p": (1.0, "share of the probability that may be drawn from; 1 is all of it"),
    "group": (0, "policy gradient: answers to each prompt, G; 0 for all other objectives"),
    "reuse": (1, "policy gradient: steps on the answers of one rollout"),
    "bits": (
        16.0,
        "policy gradient: of the layers' weights that answers are drawn with, rounded to nearest "
        "in the layout of the quantization section; 16: as they are trained",
    ),
    "longest_prompt": (
        0,
        "policy gradient: problems with longer ones are left out; 0: what a row has room for",
    ),
    "dynamic": (
        0,
        "policy gradient: further draws of other problems, to replace groups of equal rewards "
        "(DAPO); what is left has advantage 0",
    ),
    "rewards": (
        "exact",
        "names of lm.rollouts.rewards.REWARDS that judge sampled answers; 'exact,format' adds two",
    ),
    "reward_weights": ((), "of each of the rewards in their sum; () is 1 each"),
    "reward_seconds": (2.0, "that judging one answer may take; one that takes longer has none"),
}
