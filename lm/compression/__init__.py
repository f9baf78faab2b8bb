"""Quantized phases of training, quantization after training, the packed file."""
