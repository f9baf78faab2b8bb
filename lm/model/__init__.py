"""A decoder-only Transformer; the only folder that knows Flax."""
