"""What a run costs before it is started, and how fast it is."""
