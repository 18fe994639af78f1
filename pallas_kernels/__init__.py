"""Kernels of DeepSeek-V3's hot loops, importable without the rest: JAX only.

One folder an operation. `reference.py` holds the mathematics twice: a plain oracle, and
the fast path for XLA on a CPU, which is also what a GPU kernel is tested against.
`mosaic_gpu.py` is the kernel for Hopper GPUs, `api.py` the one function that chooses,
`shapes.py` the sizes that tests and `bench` take. `choice` says which runs, and why.
"""
