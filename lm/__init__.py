"""The language model and what feeds and drives it: `model`, `data`, `training`."""
