"""The proofs that kernels have to pass fail when they should."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import choice, testing
from pallas_kernels.choice import INTERPRET, INTERPRETED, XLA
from tests.pallas_kernels.marks import simulated


def doubled(x, start=0, *, wait=True):
    """2 x by two warpgroups: the first writes shared memory, the second reads it."""

    def body(x_ref, start_ref, out_ref, shared, written):
        @pl.when(lax.axis_index("wg") == 0)
        def write():
            shared[...] = 2 * x_ref[...]
            plgpu.barrier_arrive(written)

        @pl.when(lax.axis_index("wg") == 1)
        def read():
            if wait:
                plgpu.barrier_wait(written)
            out_ref[...] = shared[pl.ds(start_ref[0], 128)]
            if not wait:
                plgpu.barrier_wait(written)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        num_threads=2,
        thread_name="wg",
        interpret=INTERPRETED[INTERPRET],
    )(x, jnp.full((1,), start, jnp.int32))


X = jnp.arange(128, dtype=jnp.float32)


@simulated
def test_a_kernel_that_waits_does_not_race():
    assert (testing.interpreted(doubled)(X) == 2 * X).all()


@simulated
def test_a_race_is_found_though_a_later_kernel_has_none():
    def both(x):
        return doubled(x), doubled(x, wait=False), doubled(x)

    with pytest.raises(testing.Raced):
        testing.interpreted(both)(X)


@simulated
def test_a_kernel_that_fails_leaves_nothing_behind():
    with pytest.raises(Exception, match="Out-of-bounds read"):
        testing.interpreted(doubled)(X, 64)
    assert (testing.interpreted(doubled)(X) == 2 * X).all()


def suite(operation, **fields):
    return testing.Suite(
        operation=operation,
        oracle=lambda x: x**2,
        inputs=lambda key, size: (jax.random.normal(key, (size,)),),
        shapes={"small": 5},
        differentiable=(0,),
        **fields,
    )


def test_a_suite_accepts_what_its_oracle_computes():
    right = suite(lambda x, implementation: x * x)
    right.check_values(XLA, "small")
    right.check_gradients(XLA, "small")


def half_a_gradient(x, implementation):
    return x * lax.stop_gradient(x)


def test_a_suite_refuses_anything_else():
    with pytest.raises(AssertionError, match="result 0"):
        suite(lambda x, implementation: x**2 * 1.001).check_values(XLA, "small")
    with pytest.raises(AssertionError, match="result 0"):
        suite(half_a_gradient).check_gradients(XLA, "small")
    with pytest.raises(AssertionError, match="nan"):
        suite(lambda x, implementation: x.at[0].set(jnp.nan)).check_values(XLA, "small")
    with pytest.raises(AssertionError, match="is not"):
        suite(lambda x, implementation: x[:3]).check_values(XLA, "small")


PTX = ".target sm_90a wgmma.mma_async.sync cp.async.bulk.tensor.2d"
LOG = """ptxas info    : Function properties for body
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers"""


def test_a_report_is_read():
    testing.assert_hopper(testing.Report(PTX, LOG))
    assert testing.Report(PTX, LOG).registers == 168
    spilled = LOG.replace("0 bytes spill loads", "8 bytes spill loads")
    assert testing.Report(PTX, spilled).spills == 8
    for ptx, log, complaint in (
        (PTX, spilled, "8 bytes spilled"),
        (PTX.replace("wgmma", "mma"), LOG, "no wgmma"),
        (PTX.replace("tensor", ""), LOG, "no tma"),
        (PTX.replace("90a", "80"), LOG, "target"),
        (PTX, "", "nothing"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            testing.assert_hopper(testing.Report(ptx, log))


def able():
    """A kernel's check that has no objection."""


def unable():
    raise NotImplementedError("K = 3: the kernel wants a multiple of 16")


@simulated
def test_the_fastest_that_can_is_chosen_and_says_why():
    on_cpu = choice.choose(None, able)
    assert on_cpu.implementation == XLA
    assert "H100" in on_cpu.reason and "not on 'cpu'" in on_cpu.reason
    assert choice.choose(XLA, unable) == (XLA, "")
    assert choice.choose(INTERPRET, able) == (INTERPRET, "")


@simulated
def test_what_is_demanded_is_not_replaced():
    with pytest.raises(NotImplementedError, match="multiple of 16"):
        choice.choose(INTERPRET, unable)
    with pytest.raises(NotImplementedError, match="H100"):
        choice.choose("mosaic_gpu", able)
    with pytest.raises(ValueError, match=r"implementation = 'cuda'.*xla, mosaic_gpu"):
        choice.choose("cuda", able)


class Card:
    """A device as far as the choice looks at one."""

    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H20"])
def test_hopper_gpus_get_the_kernel(monkeypatch, kind):
    monkeypatch.setattr(choice, "target", lambda: Card(kind))
    assert choice.choose(None, able) == ("mosaic_gpu", "")
    assert choice.choose(None, unable).reason.startswith("K = 3")


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "TPU v5"])
def test_other_devices_do_not(monkeypatch, kind):
    monkeypatch.setattr(choice, "target", lambda: Card(kind))
    assert choice.choose(None, able).implementation == XLA


def test_axes_that_are_no_whole_tiles_are_copied_by_the_simulator_alone(monkeypatch):
    monkeypatch.setattr(choice, "require_hopper", lambda: None)
    for size in (3, 8, 64):
        assert choose_for(size).implementation == "mosaic_gpu"
    found = choose_for(20)
    assert found.implementation == XLA
    assert found.reason == "K = 20: the kernel wants a multiple of 8, or fewer"
    assert choose_for(20, INTERPRET) == (INTERPRET, "")
    with pytest.raises(NotImplementedError, match="K = 20"):
        choose_for(20, "mosaic_gpu")


def choose_for(size, demanded=None):
    return choice.choose(demanded, lambda: None, (("K", size, 8),))
