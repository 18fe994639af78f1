"""Compiling for H100s: what is refused, and that the step's dispatch has company.

What compiles needs the extra `aot` and NVIDIA's compiler, and is skipped without.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import aot_h100
from deepseek_jax.analysis import hlo
from deepseek_jax.config import AttentionConfig, Config, MoEConfig
from deepseek_jax.parallel import aot

ROWS, DIM, CARDS = 4096, 1024, 8


def on(devices: list[jax.Device], shape: tuple[int, ...], *axes: str | None):
    """The shape of an array, on a mesh of these devices with one axis `expert`."""
    mesh = Mesh(np.array(devices), ("expert",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


@pytest.mark.parametrize("n", [0, -8, 12, 9])
def test_parts_of_a_host_are_refused(n: int):
    with pytest.raises(ValueError, match=f"n = {n} H100s: .*whole hosts of 8"):
        aot.h100s(n)


def test_without_a_plugin_it_says_what_to_install(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
    with pytest.raises(NotImplementedError, match=r"deepseek_jax\[aot\]"):
        aot.h100s(8)


class Broken:
    """Lowered, but it will not compile."""

    def __init__(self, why: str):
        self.why = why

    def compile(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError(self.why)


def test_without_nvidias_compiler_it_says_what_to_install():
    with pytest.raises(NotImplementedError, match="nvidia-nvvm"):
        aot.compiled(Broken("INTERNAL: libdevice not found at ./libdevice.10.bc"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        aot.compiled(Broken("out of memory"))


@pytest.mark.parametrize("n", [1, 4, 8, 64])
def test_as_many_devices_as_asked_for(h100s, n: int):
    devices = aot.h100s(n)
    assert [device.id for device in devices] == list(range(n))
    assert {device.device_kind for device in devices} == {"NVIDIA H100 80GB HBM3"}


def exchange(x_TD: jax.Array, w_DD: jax.Array, late: jax.Array, branch: bool):
    """An all-to-all and, with nothing to do with it, a product; in a branch or not."""

    def there(x_tD):
        with jax.named_scope("dispatch"):
            x_RtD = x_tD.reshape(CARDS, -1, DIM)
            return jax.lax.all_to_all(x_RtD, "expert", 0, 0).reshape(x_tD.shape)

    def on_device(x_tD, w_DD, late):
        far = late.sum() > 0
        away_tD = jax.lax.cond(far, there, lambda x: x, x_tD) if branch else there(x_tD)
        with jax.named_scope("shared"):
            near_tD = x_tD @ w_DD
        return jnp.tanh(away_tD) + near_tD

    one = PartitionSpec("expert")
    mesh = x_TD.sharding.mesh
    specs = (one, PartitionSpec(), PartitionSpec())
    step = jax.shard_map(
        on_device, mesh=mesh, in_specs=specs, out_specs=one, check_vma=False
    )
    return jax.jit(step).lower(x_TD, w_DD, late)


@pytest.mark.parametrize("branch", [False, True])
def test_what_is_free_to_overlap_does_and_a_branch_is_not(h100s, branch: bool):
    x_TD = on(h100s, (CARDS * ROWS, DIM), "expert")
    lowered = exchange(x_TD, on(h100s, (DIM, DIM)), on(h100s, (DIM,)), branch)
    found = hlo.collectives(aot.compiled(lowered).as_text())
    (sent,) = [c for c in found if c.within("dispatch")]
    assert sent.kind == "all-to-all"
    assert sent.bytes == ROWS * DIM * 2
    assert sent.groups == (tuple(range(CARDS)),)
    if branch:
        assert sent.exposed and sent.times is None
    else:
        assert sent.asynchronous and sent.times == 1
        (product,) = sent.under_scope("shared")
        assert product.flops == 2 * ROWS * DIM * DIM


def small(config: Config) -> Config:
    """The same step with smaller matrices, which compiles in less time."""
    model = dataclasses.replace(
        config.model,
        vocab_size=1024,
        dim=1024,
        num_layers=2,
        dense_dim=2048,
        attention=AttentionConfig(num_heads=8, q_rank=256, kv_rank=128),
        moe=MoEConfig(num_experts=16, ffn_dim=512, num_groups=4, keep_groups=2),
    )
    data = dataclasses.replace(config.data, length=1024)
    return dataclasses.replace(config, model=model, data=data)


@pytest.mark.slow
def test_dispatch_runs_under_the_shared_expert(h100s):
    mesh = aot_h100.mesh_of(CARDS, "all_to_all", "bf16")
    made = small(aot_h100.config(CARDS, 2, 1024, mesh))
    text, memory, _ = aot_h100.compile_for(made)
    assert memory["total"] < aot_h100.DEVICE_GIB
    assert memory["alias"] > 0.9 * memory["argument"]  # the state is donated
    sent = aot_h100.exchanges(hlo.collectives(text))
    passes = [(aot_h100.direction(c), c.within("dispatch")) for c in sent]
    # Forward, its repetition and backward; what is kept makes one combine superfluous.
    assert sorted(passes) == [
        ("again", True),
        ("backward", False),
        ("backward", True),
        ("forward", False),
        ("forward", True),
    ]
    assert all(c.asynchronous for c in sent)
    for c in sent:
        again = aot_h100.direction(c) == "again"  # as well under other repetitions
        under = c.under if again else c.under_scope("shared")
        assert under or not c.within("dispatch")
