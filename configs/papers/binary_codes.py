"""Language models without a trained input table (arXiv 2605.09751): table, codes, recoded codes.

Command: python -m launch.train --config=configs/papers/binary_codes.py:affine --workdir=DIR
         --config.data.corpus=CORPUS [--config.data.tokenizer=FILE/tokenizer.json]
Small:   python -m launch.train --config=configs/papers/binary_codes.py:affine,small --workdir=DIR
         2.6 million parameters (3.3 with the table), 600 steps, about 5 minutes on 2 CPU cores.

The argument is `learned` (a trained table), `binary` (the bits of the id) or `affine` (the bits of
the id under an invertible affine map over GF(2)); `,small` makes it fit a CPU.

Parameters, norms apart: 469,762,048 with codes, of which 67,108,864 are the head; 536,870,912 with
the table, which is another 67,108,864, and three times as many numbers in the train state (AdamW).

The paper's result is 2.36 (codes), 2.44 (table) and 2.39 (recoded) validation perplexity, means of
three seeds that differ by 4.8%: not a resolved difference, and perplexities of another tokenizer
than any here. A later report by the same author (arXiv 2610.04002, 1.7 billion parameters, 100
billion tokens, single runs) finds the table better. Compare the arms with each other, in bits per
byte.

What the paper says: 32 layers, width 1024, 32 heads, context 1024, 65,536 entries, RoPE, GELU, a
trained untied head, codes repeated to the width without a projection, about 17 billion tokens of
FineWeb-Edu and Cosmopedia. What we have not found confirmed there, and is our choice here:

- the tokenizer (not available; BPE on your corpus, which must be large enough to fill 65,536
  entries, or give a tokenizer.json) and the mixture of the data (give `data.corpus`);
- RMSNorm. With LayerNorm the tokens 0 and 65,535 of the codes would be one to the model;
- no biases, the tanh form of GELU, rotary base 10,000, an MLP of 4 x width (this one agrees with
  the parameter counts of the predecessor's model cards);
- values {0, 1}, tiled, not scaled; how A and b are drawn (uniformly, here);
- optimizer, learning rate, schedule, batch, weight decay, precision, initialisation.
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("learned", "binary", "affine")


def get_config(argument: str = "binary") -> ConfigDict:
    """Returns the config of one arm, "learned", "binary" or "affine"; "ARM,small" for a CPU.

    Raises:
      LookupError: another argument.
    """
    arm, _, size = argument.partition(",")
    if arm not in ARMS or size not in ("", "small"):
        # ml_collections would show a ValueError with its traceback.
        raise LookupError(
            f"argument {argument!r} is not {', '.join(ARMS)}, or one of them + ,small"
        )
    config = base.get_config()
    config.model.update(embedding=arm, activation="gelu", norm="rmsnorm", tied_head=False)
    if size == "small":
        # 12 bits in a width of 16 x 12; the table would be 0.8 of 3.3 million parameters.
        config.model.update(layers=4, width=192, heads=6, kv_heads=6, mlp_width=768)
        config.data.update(tokenizer="bpe", vocab_size=4096, sequence_length=128)
        config.train.update(steps=600, batch_size=16)
        config.evaluation.update(every_steps=200, batches=16)
        return config
    config.model.update(layers=32, width=1024, heads=32, kv_heads=32, mlp_width=4096)
    config.model.update(dtype="bfloat16", remat="full")
    config.data.update(corpus="", tokenizer="bpe", vocab_size=65_536, sequence_length=1024)
    # 512 x 1024 tokens a step: 17.0 billion tokens.
    config.train.update(steps=32_425, batch_size=512)
    config.optimizer.update(peak_learning_rate=6e-4, warmup_steps=1000, beta2=0.95)
    config.mesh.update(data=1, fsdp=-1)
    config.checkpoint.update(every_minutes=30.0)
    config.evaluation.update(every_steps=1000, sample_prompt="The ")
    return config
