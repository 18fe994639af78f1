"""Checkpoints and what stands in a run's `config.json`."""
