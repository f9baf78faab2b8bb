"""What is minimised: pure functions of arrays and pytrees. No Flax, no I/O, no global state."""
