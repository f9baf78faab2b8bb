"""Full precision, then quantization-aware training, with the split planned (arXiv 2509.22935).

Command: python -m launch.train --config=configs/papers/compute_optimal_qat.py:86m --workdir=DIR
         --config.data.corpus=CORPUS --config.data.tokenizer=FILE/tokenizer.json
Small:   python -m launch.train --config=configs/papers/compute_optimal_qat.py:small --workdir=DIR
         1 million parameters, 600 steps, 3 to 4 minutes on 2 CPU cores.
Plan:    python -m launch.plan --config=configs/papers/compute_optimal_qat.py:small --devices=1

The argument is `86m`, `396m`, `759m`, `2.2b` or `small`; a second one after a comma is the width in
bits, 4 by default: `small,2`; 16 is the full-precision run to compare with. Change
quantization.fraction and quantization.fused_cooldown to leave the plan.

The paper trains Llama-like models of these four sizes with tied embeddings on DCLM, 2.3 billion to
1.4 trillion tokens, at 1, 2, 4 and 6 bits: weights only, ParetoQ's quantizers with a scale for each
output channel, embedding and head never below 4 bits. The best share of quantized training grows
with tokens per parameter-byte, S, as exp(-6.7297 / ln S); with the decay of the learning rate run
inside the quantized phase ("fused"), 4 and 6 bits gain, 1 and 2 bits do not.

What we have not found confirmed there, and is our choice here: depth and width of each size (only
the totals are known; ours are within 1% of them with 32,768 entries), the tokenizer, sequence
length, batch, optimizer and learning rate, warmup, the shape and length of the decay, whether the
optimizer's moments begin anew at the switch (quantization.reset_optimizer), the tokens of each run
(20 a parameter here). The fitted coefficients of its loss law are unknown, so none are here;
`objectives.quantization.fit_qat_law` fits them to runs of your own.
"""

from ml_collections import ConfigDict

from configs import base, quickstart

# layers, width, heads, MLP width, steps of 512 x 1,024 tokens
SIZES = {
    "86m": (10, 704, 11, 2048, 3_285),
    "396m": (24, 1088, 17, 3136, 15_067),
    "759m": (28, 1408, 22, 4160, 29_000),
    "2.2b": (32, 2304, 36, 6528, 83_880),
}


def get_config(argument: str = "86m") -> ConfigDict:
    """Returns the config of "SIZE" or "SIZE,BITS".

    Raises:
      LookupError: another argument.
    """
    size, _, bits = argument.partition(",")
    if size not in (*SIZES, "small") or (not bits.replace(".", "", 1).isdigit() and bits):
        # ml_collections would show a ValueError with its traceback.
        raise LookupError(
            f"argument {argument!r} is not {', '.join(SIZES)} or small, or one of them + ,BITS"
        )
    config = quickstart.get_config() if size == "small" else base.get_config()
    config.quantization.bits = float(bits or 4)
    if size == "small":
        # S is 4.7 at 4 bits, for which the plan is 8 steps: too few for the decay to run in them.
        config.quantization.fraction = "0.4"
        config.optimizer.update(name="adamw", peak_learning_rate=5e-3)
        config.evaluation.update(ngram_order=0, sample_tokens=0)
        return config
    layers, width, heads, mlp_width, steps = SIZES[size]
    config.model.update(layers=layers, width=width, heads=heads, kv_heads=heads)
    config.model.update(mlp_width=mlp_width, activation="swiglu", tied_head=True)
    config.model.update(dtype="bfloat16", remat="full")
    config.data.update(corpus="", tokenizer="bpe", vocab_size=32_768, sequence_length=1024)
    config.train.update(steps=steps, batch_size=512)
    config.optimizer.update(peak_learning_rate=6e-4, warmup_steps=500, beta2=0.95)
    config.optimizer.update(schedule="wsd", decay_fraction=0.1, final_fraction=0.0)
    config.mesh.update(data=1, fsdp=-1)
    config.checkpoint.update(every_minutes=30.0)
    config.evaluation.update(every_steps=1000, sample_prompt="The ")
    return config
