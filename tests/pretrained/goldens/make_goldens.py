"""Writes the logits of tiny models of transformers, one .npz a model; needs torch and transformers.

python tests/pretrained/goldens/make_goldens.py [FOLDER]

The weights are `random_weights.tensor` of their names, so that a file holds the logits, the tokens,
and config.json and the shapes of all tensors as JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as hf

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from random_weights import tensor  # noqa: E402

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TIED = {"tie_word_embeddings": True}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {
    "rope_theta": 5000.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WINDOW = {"sliding_window": 5}
GEMMA = {**GROUPED, **TIED, **WINDOW, "head_dim": 16, "query_pre_attn_scalar": 20}

CONFIGS = {
    "llama": hf.LlamaConfig(
        **GROUPED, rms_norm_eps=1e-5, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True
    ),
    "llama_linear": hf.LlamaConfig(
        **GROUPED,
        **TIED,
        head_dim=16,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0},
    ),
    "mistral": hf.MistralConfig(**GROUPED, **WINDOW, head_dim=16),
    "smollm3": hf.SmolLM3Config(**GROUPED, **TIED, **ENDS),
    "qwen2": hf.Qwen2Config(**GROUPED, **WINDOW, use_sliding_window=True, max_window_layers=2),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": hf.Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 7}, rope_parameters=GEMMA3_ROPE
    ),
    "olmo2": hf.Olmo2Config(**GROUPED),
    "phi3": hf.Phi3Config(
        **GROUPED,
        **WINDOW,
        **ENDS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "gpt2": hf.GPT2Config(
        vocab_size=67,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": hf.GPTNeoXConfig(**SIZES, **ENDS, rotary_pct=0.5),
    "gpt_neox_sequential": hf.GPTNeoXConfig(
        **SIZES, **ENDS, rotary_pct=0.25, use_parallel_residual=False
    ),
}


def logits(config, tokens):
    """Logits in float32 and the shapes of the tensors that save_pretrained writes."""
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    named = dict(model.named_parameters())
    if config.model_type == "gpt_neox":  # The files keep an older name.
        named["embed_out.weight"] = named.pop("lm_head.weight")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape))))
        shapes = {name: list(p.shape) for name, p in named.items()}
        return model(torch.from_numpy(tokens).long()).logits.float().numpy(), shapes


def main():
    """Writes all of them, beside this file or into the folder that is given."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    tokens = np.random.default_rng(1).integers(0, 67, (2, 24)).astype(np.int32)
    for name, config in CONFIGS.items():
        found, shapes = logits(config, tokens)
        description = json.dumps({"config": config.to_dict(), "shapes": shapes})
        np.savez_compressed(
            folder / f"{name}.npz", tokens=tokens, logits=found, description=description
        )


if __name__ == "__main__":
    main()
