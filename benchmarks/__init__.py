"""Measurements of speed and memory; each file's `--help` says what it measures."""
