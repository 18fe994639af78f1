"""Programs for H100s, compiled where there are none: what fits, what runs under what.

XLA's compiler for NVIDIA GPUs needs a description of the card, not a card. The numbers
are those of an H100 SXM5 with 80 GB, in XLA's own terms (as in openxla/xla#25919): they
decide tile sizes and fusions, and how much may be under way at once, for the scheduler
gives overlap up where memory runs short. What is tuned on a card is not: all matrix
products become XLA's own kernels, and sorts its slow ones.
"""

import jax
from jax.experimental import topologies

PER_HOST = 8  # cards that NVLink joins

# Several collectives at once, so that a small one does not take the place beside a
# matrix product from a large one. Experimental: see to it whenever jax is renewed.
OVERLAP: dict[str, bool | int | str] = {
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4
}

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def h100s(n: int) -> list[jax.Device]:
    """Devices to compile for, not to run on: one host's cards, or whole hosts of 8.

    `jax.jit(f).lower(shapes).compile()` with shardings on a mesh of them gives the
    program's text and its memory; arrays cannot lie on them. JAX_PLATFORMS=cpu in the
    environment keeps JAX from looking for a card.

    Raises:
      ValueError: `n` is neither 1 to 8 nor a multiple of 8.
      NotImplementedError: JAX has no plugin for NVIDIA GPUs here.
    """
    if n < 1 or (n > PER_HOST and n % PER_HOST):
        raise ValueError(f"n = {n} H100s: must be 1 to {PER_HOST}, or whole hosts of 8")
    hosts, cards = max(n // PER_HOST, 1), min(n, PER_HOST)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=H100,
            topology=f"1x{hosts}x{cards}",
        )
    except NotImplementedError as error:
        raise NotImplementedError(
            "compiling for H100s needs JAX's plugin for NVIDIA GPUs, not a GPU: "
            "pip install 'deepseek_jax[aot]'"
        ) from error
    return list(topology.devices)


def compiled(
    lowered: jax.stages.Lowered, options: dict[str, bool | int | str] | None = None
) -> jax.stages.Compiled:
    """Compiles what was lowered for `h100s`; `options` are XLA's (xla_gpu_...).

    Raises:
      NotImplementedError: files of NVIDIA's compiler are missing.
    """
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not any(name in str(error) for name in ("libdevice", "ptxas", "nvlink")):
            raise
        raise NotImplementedError(
            "compiling for H100s needs libdevice, ptxas and nvlink of a CUDA "
            "toolkit, or: pip install nvidia-cuda-nvcc nvidia-nvvm"
        ) from error
