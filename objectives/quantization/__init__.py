"""Fewer bits: quantizers, quantization-aware training, post-training baselines, packing, laws.

`QUANTIZERS` are the factories by name.
"""

from objectives.quantization.activations import activation_quantizer
from objectives.quantization.base import Grid, Quantizer
from objectives.quantization.bit_packing import (
    pack,
    pack_layers,
    packed_layers_size,
    packed_size,
    unpack,
    unpack_layers,
)
from objectives.quantization.block_float import fp8_e4m3, fp8_e5m2, mxfp4, nvfp4
from objectives.quantization.data_scale import absmax, minmax
from objectives.quantization.dense_shift import dense_shift
from objectives.quantization.gptq import calibration_hessian, gptq, round_to_nearest
from objectives.quantization.hadamard import hadamard, randomized_hadamard
from objectives.quantization.learned_range import learned_range
from objectives.quantization.learned_scale import elastic_binary, lsq, paretoq, seq, ternary
from objectives.quantization.mixed import Mixed, mixed, quantizer_of_layer, settle
from objectives.quantization.optimal_qat import (
    QATLaw,
    best_bits,
    best_fraction,
    best_loss,
    fit_qat_law,
    optimal_qat_fraction,
    qat_law,
    wasted_tokens,
)
from objectives.quantization.precision_laws import chen_qat_law, kumar_precision_law
from objectives.quantization.qat import (
    default_quantizers,
    init_scales,
    outside_clip_range,
    quantization_error,
    quantize_tree,
)
from objectives.quantization.scale_search import searched

QUANTIZERS = {
    "paretoq": paretoq,
    "elastic_binary": elastic_binary,
    "ternary": ternary,
    "seq": seq,
    "lsq": lsq,
    "learned_range": learned_range,
    "absmax": absmax,
    "minmax": minmax,
    "dense_shift": dense_shift,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "fp8_e4m3": fp8_e4m3,
    "fp8_e5m2": fp8_e5m2,
}

__all__ = [
    "QUANTIZERS",
    "Grid",
    "Mixed",
    "QATLaw",
    "Quantizer",
    "absmax",
    "activation_quantizer",
    "best_bits",
    "best_fraction",
    "best_loss",
    "calibration_hessian",
    "chen_qat_law",
    "default_quantizers",
    "dense_shift",
    "elastic_binary",
    "fit_qat_law",
    "fp8_e4m3",
    "fp8_e5m2",
    "gptq",
    "hadamard",
    "init_scales",
    "kumar_precision_law",
    "learned_range",
    "lsq",
    "minmax",
    "mixed",
    "mxfp4",
    "nvfp4",
    "optimal_qat_fraction",
    "outside_clip_range",
    "pack",
    "pack_layers",
    "packed_layers_size",
    "packed_size",
    "paretoq",
    "qat_law",
    "quantization_error",
    "quantize_tree",
    "quantizer_of_layer",
    "randomized_hadamard",
    "round_to_nearest",
    "searched",
    "seq",
    "settle",
    "ternary",
    "unpack",
    "unpack_layers",
    "wasted_tokens",
]
