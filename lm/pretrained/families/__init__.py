"""The families of models that are read and written: `model_type` of config.json -> `Family`."""

from lm.pretrained.families import gemma, gpt2, gpt_neox, llama, olmo2, phi3, qwen

FAMILIES = {
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "smollm3": llama.SMOLLM3,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "olmo2": olmo2.OLMO2,
    "phi3": phi3.PHI3,
    "gpt2": gpt2.GPT2,
    "gpt_neox": gpt_neox.GPT_NEOX,
}
