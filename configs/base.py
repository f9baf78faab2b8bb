"""Every key of a run, its default and what it means; an experiment file changes what it is about.

Command: python -m launch.train --config=configs/base.py --workdir=runs/base
All keys: python -m launch.plan --keys
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs.sections.quantization import QUANTIZATION
from configs.sections.rollouts import ROLLOUTS
from lm.rollouts.rewards import REWARDS
from objectives import OBJECTIVES
from objectives.hyperparameters import hyperparameters
from objectives.losses import LOSSES
from objectives.weighting import WEIGHTINGS

# Sections of name -> (default, meaning). The hyper-parameters of objectives, losses, weightings and
# rewards are those of their factories, each in a section `objective.NAME` or `rollouts.NAME`.
MODEL = {
    "layers": (4, "number of Transformer blocks"),
    "width": (128, "residual stream, D"),
    "heads": (4, "query heads, N"),
    "head_width": (0, "channels of a head, H; 0 is width / heads"),
    "kv_heads": (4, "key and value heads; fewer than heads is grouped-query attention"),
    "mlp_width": (512, "hidden width of the MLP, F"),
    "activation": ("gelu", "gelu | gelu_exact | relu2 | swiglu | geglu (a third MLP matrix)"),
    "mlp_bias": (False, "biases of the MLP's products"),
    "norm": ("rmsnorm", "rmsnorm | layernorm, of each sub-block and at the end"),
    "norm_placement": ("before", "before | after | both: where a sub-block's norms are"),
    "norm_epsilon": (1e-6, "added to the mean square"),
    "norm_offset": (0.0, "a norm's scale less what is stored of it; Gemma's is 1"),
    "norm_bias": (False, "rmsnorm: a bias behind the scale, as layernorm has"),
    "parallel_block": (False, "the MLP reads what the attention reads, not its result"),
    "embedding": (
        "learned",
        "learned | binary | affine | random_codes | gaussian | projected | learned_low_rank: "
        "input interface, see lm/model/embeddings.py",
    ),
    "embedding_scale": (0.0, "learned only: factor on the table's rows; 0 is sqrt(width)"),
    "embedding_rank": (32, "learned_low_rank only: width of the first factor"),
    "code_bits": (0, "bits of a code, K; 0 is the fewest, ceil(log2 vocabulary)"),
    "code_values": ("zero_one", "zero_one | plus_minus_one: what the bits become"),
    "code_layout": ("tile", "tile | interleave: how a code is repeated to the width"),
    "code_scale": (1.0, "factor on codes and gaussian vectors"),
    "code_signs": ("none", "none | alternate | random: a fixed sign for each copy"),
    "code_seed": (0, "of affine, random_codes, gaussian and random signs"),
    "accept_aliasing": (False, "layernorm: let two tokens be the same to the model"),
    "tied_head": (False, "use the embedding table as the output head"),
    "code_head": (False, "use the codes of all tokens as the output head"),
    "positions": ("rotary", "rotary | learned (a table of max_positions, added to the input)"),
    "max_positions": (1024, "longest text; learned positions have a table of as many rows"),
    "rope_base": (10_000.0, "longest wavelength of the rotary positions is 2 pi base"),
    "rope_share": (1.0, "share of a head's channels that are rotated"),
    "rope_scaling": ("none", "none | linear | llama3: rotary positions for longer texts"),
    "rope_factor": (1.0, "of rope_scaling"),
    "rope_low_frequency": (1.0, "llama3 only: slower ones are divided by the factor"),
    "rope_high_frequency": (4.0, "llama3 only: faster ones are kept"),
    "rope_original_length": (8192, "llama3 only: tokens that both are turns in"),
    "layer_pattern": (
        "G",
        "a letter a layer, repeated: G sees all, L a window, N all without rotary positions",
    ),
    "window": (0, "tokens that an L layer sees, the token itself included"),
    "local_rope_base": (0.0, "rope_base of L layers, without scaling; 0 is as the others"),
    "qk_norm": (False, "RMSNorm on queries and keys"),
    "qk_norm_scope": ("head", "head | all: channels that one such norm is over"),
    "attention_bias": ("none", "none | qkv | all: biases of the attention's products"),
    "attention_scale": (0.0, "factor on products of queries and keys; 0 is 1 / sqrt(H)"),
    "attention_softcap": (0.0, "they become cap * tanh(x / cap); 0 is off"),
    "adapter_rank": (0, "rank of low-rank adapters (LoRA), trained alone; 0 is none"),
    "adapter_alpha": (16.0, "an adapter's product is multiplied by alpha / rank"),
    "adapter_dropout": (0.0, "share of an adapter's inputs that a training step leaves out"),
    "adapter_matrices": (
        "",
        "matrices that have adapters, a regular expression as 'attention|mlp/up'; '' is all",
    ),
    "logit_softcap": (0.0, "logits become cap * tanh(logits / cap); 0 is off"),
    "attention": ("auto", "auto | einsum | xla | cudnn | splash (TPU)"),
    "remat": ("none", "none | full | dots: what the backward pass recomputes"),
    "unroll": (0, "layers in one turn of the loop; 0: up to 8 without remat, else 1"),
    "dtype": ("float32", "compute dtype: float32 | bfloat16"),
    "param_dtype": ("float32", "storage dtype of parameters: float32 | bfloat16"),
    "plain_autodiff": (
        False,
        "no custom gradients, slower on CPU: with objective.block_size=0, jax.jvp and "
        "forward-over-reverse Hessian products work",
    ),
}

DATA = {
    "corpus": (
        "stdlib",
        "stdlib | tfds:NAME[/config] | FOLDER | FILE.jsonl (.ndjson, .jsonl.gz, .jsonl.zst, .json "
        "with an array, .parquet); commas mix",
    ),
    "mixture_weights": ((), "one weight a corpus; () is in proportion to documents"),
    "tokenizer": ("bytes", "bytes | bpe (trained on the corpus) | FILE/tokenizer.json"),
    "vocab_size": (
        0,
        "entries of a bpe tokenizer; of a tokenizer.json rows of the table, 0 is as many as needed",
    ),
    "end_of_text": ("", "token of a tokenizer.json; '' is the one that it declares"),
    "beginning_of_text": ("", "token that opens a document; '' is as declared, else the end"),
    "sequence_length": (256, "tokens a row, T"),
    "packing": ("concat", "concat (and split) | best_fit (documents stay whole, as pairs must)"),
    "corrupted": (0.0, "share of training documents that get their words in random order"),
    "shuffle_rows": (1024, "rows of one shuffle window, after packing"),
    "validation_fraction": (0.05, "share of documents held out, by a hash of their name"),
    "streams": (0, "shares of the corpora that a batch is made of; 0 is one a process"),
    "workers": (0, "processes that prepare batches; 0 is a thread"),
    "directory": ("", "where corpora are cached; '' is ~/.cache/nibble"),
}

TRAIN = {
    "steps": (1000, "optimizer steps"),
    "batch_size": (16, "rows of one optimizer step over all devices, B"),
    "accumulation": (1, "micro-batches that one step is split into"),
    "seed": (0, "of initialisation and data order"),
    "trainable": (
        "",
        "paths of the parameters that are trained, a regular expression as 'mlp|norm'; '' is all, "
        "or the adapters alone where there are some",
    ),
    "frozen": (
        "as_is",
        "as_is | int8 | int4 | nf4: how matrices of the layers that are not trained are kept in "
        "memory",
    ),
    "ema_decay": (0.0, "exponential moving average of parameters; 0 is off"),
    "spike_factor": (
        0.0,
        "skip steps with a gradient norm above this times its moving average; 0 is off",
    ),
    "max_skips": (10, "abort after this many skipped steps in a row"),
    "compiler_options": (
        "auto",
        "auto (what helps on this kind of device) | none | options of XLA for the train step as "
        "'name=value,name=value', in place of those",
    ),
    "log_every": (10, "steps between lines of metrics.jsonl and of the log"),
    "peak_flops": (0.0, "FLOP/s of one device for the MFU; 0 looks up known accelerators"),
    "tensorboard": (True, "TensorBoard event files, in a local work directory"),
    "wandb_project": ("", "Weights & Biases project; '' is off"),
    "wandb_group": ("", "its group of runs; '' is none, launch.ablate sets the ablation's name"),
}

OPTIMIZER = {
    "name": ("adamw", "adamw | lion | muon (AdamW for all that is not a matrix)"),
    "peak_learning_rate": (0.002, "after warmup; of the matrices under muon"),
    "adam_learning_rate": (0.002, "muon only: peak for embedding, head and norms"),
    "schedule": ("cosine", "cosine | wsd (warmup, stable, decay) | constant"),
    "warmup_steps": (50, "linear: step i of n takes (i + 1) / n of the peak"),
    "decay_fraction": (0.2, "wsd only: share of the steps in the decay"),
    "decay_shape": ("linear", "wsd only: linear | cosine | sqrt (1 - sqrt)"),
    "final_fraction": (0.1, "last learning rate / peak"),
    "extended_from": (
        (),
        "earlier train.steps of a run that goes on, as (1000,): from each on, the last learning "
        "rate decays once more, to final_fraction of it; () is one schedule for all steps",
    ),
    "weight_decay": (0.1, "decoupled, on matrices only"),
    "beta1": (0.9, "AdamW and Lion: momentum"),
    "beta2": (0.98, "AdamW and Lion: second momentum"),
    "momentum": (0.95, "muon only, Nesterov"),
    "clip_norm": (1.0, "global gradient norm; 0 is off"),
}

OBJECTIVE = {
    "name": (
        "weighted",
        "weighted (a weighted mean of one loss a token) | another name of objectives.OBJECTIVES",
    ),
    "loss": ("cross_entropy", "a name of objectives.losses.LOSSES"),
    "weighting": (
        "uniform",
        "uniform (the weights of the data) | another name of objectives.weighting.WEIGHTINGS; "
        "'dft*dynamic' multiplies two",
    ),
    "normalisation": ("kept", "kept | all | sequence: what the loss is divided by"),
    "z_loss": (0.0, "coefficient of the mean squared log-sum-exp"),
    "block_size": (
        1024,
        "vocabulary entries of one block of the loss; 0: all at once and no custom gradients, for "
        "forward mode and Hessian products",
    ),
}

# Where what an objective compares with comes from: ema (the average of the model's parameters, with
# train.ema_decay above 0), base (the frozen model below the adapters), a second, frozen model (the
# newest checkpoint of a work directory, a Hugging Face folder or a .gguf file) or a folder of
# launch.score. Read where the objective needs it; "" is nowhere.
REFERENCES = {
    "reference_nll": ("", "rho1: losses that the excess is over; dpo and others: the reference"),
    "history_nll": ("", "ss_token: losses that progress is measured from"),
    "prior_nll": ("", "prior: losses of a model without the context"),
    "full_nll": ("", "block_sensitive: losses under full attention"),
    "likelihood": ("", "frequency_equity: scores only"),
    "contrast_probability": ("", "critical_token: scores only"),
    "error_mask": ("", "fait: scores only"),
    "faulty_log_probability": ("", "fait: scores only"),
    "teacher": (
        "",
        "of a distillation: ema, base, a work directory, a Hugging Face folder or a .gguf",
    ),
    "contrast_teacher": ("", "align_distil: the model that is subtracted from the teacher"),
    "teacher_top_k": ("", "top_k_distillation: scores only"),
    "teacher_sorted": ("", "uld: scores only"),
    "chunk_log_probability": ("", "alm: scores only"),
    "reward_nll": ("", "tgdpo: losses of a model trained with dpo before"),
    "better_nll": ("", "treg: losses under a prompt for better answers, scores only"),
    "worse_nll": ("", "treg: losses under a prompt for worse answers, scores only"),
    "desirable_probability": ("", "bco with match_prompts: scores only"),
}

# The model that a run begins with.
INITIALISE = {
    "from": ("", "a work directory, a Hugging Face folder or a .gguf; '' is fresh parameters"),
    "family": ("", "its model_type, which launch.export writes again; '' is any that fits"),
}

MESH = {
    "data": (-1, "data parallel; -1 takes the devices that are left"),
    "fsdp": (1, "data parallel with parameters sharded"),
    "tensor": (1, "heads, MLP and vocabulary sharded"),
    "sequence": (1, "sequence sharded"),
    "unsharded_tolerance": (
        0.02,
        "with fsdp or tensor, share of the parameters that every device may hold whole",
    ),
}

# Several processes that train together.
DISTRIBUTED = {
    "processes": (0, "refuse another number of them; 0 is any"),
    "join_seconds": (300, "how long to wait for all of them at the start"),
    "heartbeat_seconds": (100, "silence after which one counts as lost"),
}

CHECKPOINT = {
    "every_steps": (500, "steps between checkpoints; 0 is off; the last step is always saved"),
    "every_minutes": (10.0, "minutes of training between checkpoints; 0 is off"),
    "keep": (2, "newest checkpoints kept"),
    "keep_best": (1, "checkpoints kept for their validation loss"),
    "grace_seconds": (
        10.0,
        "after a signal, how long an evaluation or calibration under way may go on before it is "
        "abandoned and the state is saved",
    ),
    "at_steps": ((), "steps that are saved besides, and never removed"),
}

EVALUATION = {
    "every_steps": (250, "steps between evaluations; 0 is only at the end"),
    "batches": (32, "validation batches during training; 0 and the end use all"),
    "sample_tokens": (100, "tokens of the text sample; 0 is none"),
    "sample_prompt": ("def ", "what the sample continues"),
    "problems": (
        0,
        "held-out problems that are answered greedily and judged at each evaluation; 0 is none",
    ),
    "tasks": (
        "",
        "files of tasks in lm_eval's form, FILE.yaml,..., evaluated at each evaluation; none by "
        "default",
    ),
    "ngram_order": (0, "Witten-Bell byte n-gram to compare with; 0 is none"),
}

SECTIONS = {
    "model": MODEL,
    "data": DATA,
    "train": TRAIN,
    "optimizer": OPTIMIZER,
    "objective": OBJECTIVE,
    "objective.references": REFERENCES,
    "quantization": QUANTIZATION,
    "rollouts": ROLLOUTS,
    "initialise": INITIALISE,
    "mesh": MESH,
    "distributed": DISTRIBUTED,
    "checkpoint": CHECKPOINT,
    "evaluation": EVALUATION,
}


def get_config() -> ConfigDict:
    """Returns the defaults: a byte-level model of 0.8 million parameters."""
    config = ConfigDict()
    for section, name, (default, _) in entries():
        at = config
        for part in section.split("."):
            if part not in at:
                at[part] = ConfigDict()
            at = at[part]
        at[name] = default
    return config.lock()  # a key that is not here is an error


def meanings() -> dict[str, str]:
    """Every key, such as "model.layers", and what it means."""
    return {f"{section}.{name}": meaning for section, name, (_, meaning) in entries()}


def entries() -> Iterator[tuple[str, str, tuple[Any, str]]]:
    """Yields (section, name, (default, meaning)) of every key."""
    factories = {
        f"objective.{name}": hyperparameters(factory)
        for registry in (OBJECTIVES, LOSSES, WEIGHTINGS)
        for name, factory in registry.items()
        if name != "weighted"
    }
    factories |= {f"rollouts.{name}": hyperparameters(one) for name, one in REWARDS.items()}
    for section, keys in {**SECTIONS, **factories}.items():
        for name, entry in keys.items():
            yield section, name, entry
