"""A trained model is put on 2 bits, and taught by itself (arXiv 2305.17888).

Before:  python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
Command: python -m launch.train --config=configs/losses/self_distillation.py
         --workdir=runs/self_distillation
Against: the same with --config.objective.loss=cross_entropy
Cost:    4 minutes on 2 CPU cores: the teacher's forward pass comes on top.

Claim: labels of a model's own distribution bring a quantized model nearer to it than those of the
text. The paper trains on text that the model itself writes, this config on the corpus, so none of
the paper's numbers is confirmed here. For a pretrained model there is configs/qat.py.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.objective.loss = "distillation"
    config.objective.references.teacher = "runs/quickstart"
    config.initialise.update({"from": "runs/quickstart"})
    config.quantization.update(bits=2.0, fraction="1", begin_with="search")
    config.optimizer.peak_learning_rate /= 10
    return config
