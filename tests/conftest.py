"""What every test needs before JAX starts: the CPU, shown as eight devices.

`JAX_PLATFORMS=cuda python -m pytest tests/...` runs the tests on a GPU instead.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Most of a test's time is XLA compiling programs that then run for milliseconds.
# And eight devices share two cores: a collective may have to wait for the slowest.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/jax-tests")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_num_cpu_devices", 8)

# The same examples in every run, and time to compile.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every program holds memory maps, of which a process may have some 65,000."""
    yield
    jax.clear_caches()
