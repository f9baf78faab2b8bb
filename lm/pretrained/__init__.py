"""Pretrained models of other frameworks: their files, tokenizers and parameters."""
