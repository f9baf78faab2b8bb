"""Where a run can be launched: Cloud TPU, SLURM, GKE. Each is one file, driven by launch.pod."""
