"""Every transport computes what one device does: values, gradients, any routing."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax import runtime
from deepseek_jax.config import TRANSPORTS, MeshConfig
from deepseek_jax.parallel import expert
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import transport as transports
from tests.agreement import assert_agree
from tests.parallel.test_training import MOE, config_of, trained

TOKENS, DIM = 96, 16
NODES = {"node": 2, "expert": 4}


def layer(routing: str):
    """Tokens, weights, the experts chosen, and matrices, in float64."""
    rng = np.random.default_rng(1)
    shape = (MOE.num_experts, DIM, MOE.ffn_dim)
    experts = np.argsort(rng.random((TOKENS, MOE.num_experts)), 1)[:, : MOE.top_k]
    if routing == "one device":  # the experts of which are all chosen by all
        experts = np.broadcast_to(np.arange(MOE.top_k), experts.shape)
    matrices = [rng.normal(size=s) for s in (shape, shape, shape[::1])]
    floats = rng.normal(size=(TOKENS, DIM)), rng.random(experts.shape), *matrices
    return floats, experts.astype(np.int32), rng.normal(size=(TOKENS, DIM))


@functools.cache
def results(mesh: MeshConfig, routing: str):
    """The sum over y * cotangent, and its gradient by every float."""
    with jax.enable_x64(True):
        config = config_of(mesh)
        device = runtime.build(config.runtime)
        rt = expert.on_mesh(
            device, config, meshes.make(mesh, jax.devices()[: mesh.size])
        )
        floats, experts, cotangent = layer(routing)

        def total(x, weights, gate, up, down):
            y, _ = rt.experts(
                x, weights, experts, gate, up, down, grouped_dot=rt.grouped_dot
            )
            return (y * cotangent).sum()

        value, grads = jax.jit(jax.value_and_grad(total, range(5)))(*floats)
        return [np.asarray(value), *map(np.asarray, grads)]


def test_every_transport_of_the_config_exists():
    assert set(transports.TRANSPORTS) == set(TRANSPORTS)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("routing", ["random", "one device"])
def test_values_and_gradients_are_those_of_one_device(transport, routing):
    got = results(MeshConfig(**NODES, transport=transport), routing)
    assert_agree(got, results(MeshConfig(), routing), 1e-12)


@pytest.mark.parametrize("transport", ["all_to_all", "two_hop", "ragged"])
def test_nothing_is_dropped_where_there_is_no_room(transport):
    """With room for a tenth of an even load, all goes by the ring."""
    tight = MeshConfig(**NODES, transport=transport, capacity=0.1)
    assert_agree(results(tight, "random"), results(MeshConfig(), "random"), 1e-12)


def test_the_one_device_routing_has_no_room():
    """Guards the test of it: at the usual capacity its rows do not fit."""
    config = config_of(MeshConfig(**NODES))
    mesh = meshes.make(config.mesh)
    rt = expert.on_mesh(runtime.build(config.runtime), config, mesh)
    group, legs = rt.experts.keywords["group"], [transports.Leg(meshes.EXPERTS, 8, 2)]

    def fits(experts):
        return transports.plan_route(group, experts, legs, False)[3][None]

    rows = jax.sharding.PartitionSpec(mesh.axis_names)
    fits = jax.jit(
        jax.shard_map(fits, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    )
    assert not np.asarray(fits(layer("one device")[1])).all()


@pytest.mark.slow
def test_fp8_dispatch_leaves_the_first_router_alone(capsys):
    """Its loads are the unquantised ones; the loss moves, by little."""
    ways = [
        MeshConfig(**NODES, transport="two_hop", payload=payload)
        for payload in ("exact", "fp8", "fp8_ue8m0")
    ]
    (exact, _), (f32, _), (bytes_, _) = (trained(w, x64=False, steps=1) for w in ways)
    np.testing.assert_array_equal(f32[0][2][0], exact[0][2][0])
    moved = abs(f32[0][0] - exact[0][0]) / exact[0][0]
    with capsys.disabled():
        print(f"\nFP8 dispatch moves the first loss by {moved:.1e} of it")
    assert 0 < moved < 1e-3
    assert bytes_[0][0] == f32[0][0]
