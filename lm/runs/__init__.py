"""What a run leaves behind and goes on from: its record, checkpoints, initialisation."""
