"""The probes of an accumulator find the one that a model has."""

import jax
import pytest

from benchmarks import fp8_hardware as hardware
from deepseek_jax.precision.accumulate import Accumulator

ONE, MANY = "same step of 32", "eight in one step"


@pytest.mark.parametrize("bits", [9, 13, 14])
@pytest.mark.parametrize("exact", [False, True])
def test_the_digits_of_a_model_are_found(bits, exact):
    found = hardware.ask(jax.jit(Accumulator(bits, 128, exact)))
    assert found[ONE] == found["last step"] == found["step before"] == bits
    # Cut one by one, or after they were added.
    assert found[MANY] == (bits - 3 if exact else bits)
    assert found["1.75 last digits"] == 1


def test_float32_is_rounded_and_keeps_24():
    found = hardware.ask(jax.jit(hardware.kernel("xla")))
    assert (found[ONE], found["1.75 last digits"]) == (24, 2)


def test_a_product_is_nearest_to_its_own_model():
    own = hardware.CANDIDATES["hopper_exact"]
    rows = hardware.compare(jax.jit(own), 64, [256], 0)
    for row in rows:
        same = row["model"] == "hopper_exact"
        assert (row["distance"] == 0) == (row["equal"] == 1) == same
