"""Programs for H100s, compiled where there are none: what fits, and what runs under what.

XLA's compiler for NVIDIA GPUs needs a description of the card, not a card. The numbers
are those of an H100 SXM5 with 80 GB as XLA itself reports them (the form of
openxla/xla#25919): they decide tile sizes, fusions, and how much the scheduler keeps in
memory. Library calls that are tuned on the device are left to XLA's own kernels.
"""

from collections.abc import Mapping

import jax
from jax.experimental import topologies

PER_HOST = 8

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
