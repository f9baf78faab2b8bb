"""One model in five sizes, each with meshes for slices of TPU v5e and v5p and for 8 H100s.

What fits where is in docs/scale.md; no config of this folder has been trained.

The input interface is that of minimal binary codes (arXiv 2605.09751), since codes are a subject of
this project: the bits of the token's id, repeated to the width, in place of a trained table. With
32,768 entries that is 15 bits, and no lookup crosses the mesh. Whether codes or a table are better
at these sizes is open, see configs/papers/binary_codes.py; --config.model.embedding=learned is the
table. Head, optimizer and remat are the same in all sizes: an untied head, AdamW with its moments
in float32, matrix products in bfloat16, and layers whose activations are computed again.

Our choice, confirmed nowhere: learning rates (GPT-3's for its sizes, Llama's for the others,
divided by nothing), 20 tokens a parameter (arXiv 2203.15556), the rows of a step.
"""

from ml_collections import ConfigDict

from configs import base


def make(hardware: str, meshes: dict[str, dict[str, int]], **model: int | str) -> ConfigDict:
    """The defaults with a model in bfloat16, on one of the meshes.

    Args:
      hardware: a name of `meshes`.
      meshes: sizes of the mesh's axes on each hardware, and `accumulation`.
      **model: keys of the `model` section.

    Raises:
      LookupError: no such hardware.
    """
    if hardware not in meshes:
        # ml_collections would show a ValueError with its traceback.
        raise LookupError(f"argument {hardware!r} is not one of: {', '.join(meshes)}")
    config = base.get_config()
    config.model.update(embedding="binary", tied_head=False, dtype="bfloat16", remat="full")
    config.model.update(**model)
    config.data.update(corpus="", tokenizer="bpe", vocab_size=32_768)
    config.optimizer.update(warmup_steps=1000, beta2=0.95)
    config.mesh.update(data=-1)
    sizes = dict(meshes[hardware])
    config.train.accumulation = sizes.pop("accumulation", 1)
    config.mesh.update(sizes)
    config.checkpoint.update(every_minutes=30.0)
    config.evaluation.update(every_steps=1000, sample_prompt="The ")
    return config
