"""The mesh, losses on it, and what all processes decide together."""
