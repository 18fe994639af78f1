"""Sweeps: each file has CONFIG, `sweep(arg=None)` and `metrics()`."""
