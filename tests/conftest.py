"""What every test needs before JAX starts: the CPU, shown as eight devices.

`JAX_PLATFORMS=cuda python -m pytest tests/...` runs the tests on a GPU instead.
"""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Most of a test's time is XLA compiling programs that then run for milliseconds: the
# emitters through MLIR alone take half of it, source locations of operations a tenth.
# The older ones copy an array at every update in a loop, so loops had better be short.
# And eight devices share two cores: a collective may have to wait for the slowest.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/jax-tests")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache

from deepseek_jax.parallel import aot

jax.config.update("jax_num_cpu_devices", 8)

# Tracing makes millions of objects, nearly none of them in cycles.
gc.set_threshold(100_000, 50, 50)

# The same examples in every run, and time to compile.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every program holds memory maps, of which a process may have some 65,000."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def h100s():
    """H100s of one host to compile for, if this machine can; REQUIRE_AOT: it must."""
    # Programs of devices that are not there can be cached but not read again.
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        devices = aot.h100s(aot.PER_HOST)
        place = jax.sharding.SingleDeviceSharding(devices[0])
        shape = jax.ShapeDtypeStruct((8,), jax.numpy.float32, sharding=place)
        aot.compiled(jax.jit(jax.numpy.exp).lower(shape))
    except NotImplementedError as error:
        give_up = pytest.fail if os.environ.get("REQUIRE_AOT") else pytest.skip
        give_up(f"NOT CHECKED, programs for GPUs: {error}")
    yield devices
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()
