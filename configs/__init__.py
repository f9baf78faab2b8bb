"""What to run: one file an experiment, each with `get_config() -> ConfigDict`."""
