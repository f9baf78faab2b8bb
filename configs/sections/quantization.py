"""Section `quantization`: the phase of training that ends on grids of few bits."""

QUANTIZATION = {
    "bits": (16.0, "of the layers' matrices: 1, 1.58, 2 to 8; 16 is off"),
    "quantizer": (
        "paretoq",
        "paretoq (by width: elastic_binary, ternary, seq, lsq) | learned_range | absmax | minmax "
        "| another name of objectives.quantization.QUANTIZERS",
    ),
    "granularity": (
        "",
        "tensor | channel | group: weights that share a scale; '' is the quantizer's own",
    ),
    "group_size": (0, "group only: inputs that share a scale; 0 is its own"),
    "outer_bits": (4.0, "least width of the embedding and the head; 16 keeps them as they are"),
    "widths": (
        "",
        "'' | FILE.json, path of a parameter -> bits of each of its layers, instead of bits; the "
        "record of a run holds the JSON itself",
    ),
    "activations": (
        "none",
        "none | int4 to int8 | fp8_e4m3 | fp8_e5m2: inputs of the layers' products, one scale a "
        "token",
    ),
    "cache": (
        "none",
        "none | int8 | int4: keys, one scale a channel, and values, one scale a token; in "
        "generation they are stored so",
    ),
    "cache_batches": (
        8,
        "at the switch, training batches that the scales of keys begin with; 0 is random tokens",
    ),
    "fraction": ("optimal", "share of the steps with quantization, or 'optimal'"),
    "fused_cooldown": (True, "decay the learning rate inside the quantized phase"),
    "warmup_steps": (20, "not fused: warmup of the quantized phase"),
    "peak_factor": (1.0, "not fused: its peak learning rate / the first phase's"),
    "reset_optimizer": (False, "begin the quantized phase with fresh moments"),
    "relative_scale_steps": (
        True,
        "steps of learned scales are the learning rate times the scale, not the learning rate "
        "alone",
    ),
    "scale_rate": (1.0, "steps of learned scales are multiplied by this"),
    "adapt_every": (
        0,
        "steps of the quantized phase between plans of widths, the first at its start; 0 is off",
    ),
    "adapt_bytes": (0, "with adapt_every: bytes of all weights, packed, that a plan may take"),
    "adapt_widths": ((2, 3, 4, 8), "with adapt_every: widths of the layers to choose from"),
    "adapt_weighting": (1.0, "with adapt_every: of the divergence of weights beside the loss's"),
    "adapt_batches": (1, "with adapt_every: training batches that gradients are of"),
    "from": ("", "a full-precision run; its checkpoint is the first phase"),
    "begin_with": (
        "weights",
        "weights (with the quantizer's first scales of them) | search (with the scales of least "
        "error) | gptq | rsq (weights and scales of these methods, from such scales): what the "
        "quantized phase begins with",
    ),
    "begin_unrounded": (
        False,
        "with gptq or rsq: weights begin as these methods had them before they rounded them, with "
        "the same codes, and not on the values of the codes",
    ),
    "gptq_batches": (8, "at the switch, calibration of GPTQ, to compare or begin with; 0 is off"),
}
