"""Decoding on a mesh is decoding on one device, wherever experts and copies lie.

In float64: the same greedy tokens, log-probabilities within 1e-10. Placed by loads that
are as uneven as measured ones, so that some experts have copies and others have none.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.analysis import hlo
from deepseek_jax.config import MeshConfig
from deepseek_jax.decode import cache as caches
from deepseek_jax.decode import engine, forward
from deepseek_jax.decode.sampling import sampling
from deepseek_jax.decode.spread import spread
from deepseek_jax.parallel import eplb, expert
from tests.decode import replica
from tests.factory import SMALL

LENGTHS = (1, 2, 9, 17, 30, 5, 8, 20)
EXPERTS, GROUPS = SMALL.moe.num_experts, SMALL.moe.num_groups
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "repetition": 1.2, "seed": 3}


@functools.cache
def prompts():
    rows = replica.chain(len(LENGTHS), max(LENGTHS), seed=1)
    return [row[:length].tolist() for row, length in zip(rows, LENGTHS, strict=True)]


def placed(mesh: MeshConfig, replicas: int, skewed: bool = False) -> eplb.Placement:
    """By made-up loads of every router; if `skewed`, of the first experts alone."""
    routers = replica.trained()[0].model.num_routers
    loads = np.random.default_rng(0).random((routers, EXPERTS)) ** 3
    if skewed:
        loads[:, SMALL.moe.top_k :] = 0
    devices = mesh.node * mesh.expert
    return eplb.place(loads, replicas, devices=devices, nodes=mesh.node, groups=GROUPS)


def skew(weights: forward.Weights) -> forward.Weights:
    """Biases that send every token to the first experts."""

    def prefer(layer):
        params, state = layer
        first = jnp.arange(EXPERTS) < SMALL.moe.top_k
        return params, jax.tree.map(lambda bias_E: bias_E + 100 * first, state)

    return weights._replace(
        blocks=tuple(map(prefer, weights.blocks)), mtp=tuple(map(prefer, weights.mtp))
    )


def generated(mesh=None, replicas=None, depth=0, skewed=False, rule=None):
    """Rows of a generation, and the model that made them."""
    with jax.enable_x64(True):
        model, weights, _ = replica.built(f64=True)
        weights = skew(weights) if skewed else weights
        if mesh:
            placement = placed(mesh, replicas, skewed) if replicas else None
            devices = jax.devices()[: mesh.size]
            model, weights = spread(
                model, weights, mesh, placement=placement, devices=devices
            )
        return engine.generate(
            model,
            weights,
            prompts(),
            12,
            depth=depth,
            dtype=jnp.float64,
            rule=sampling(len(LENGTHS), **(rule or {})),
        ).rows


alone = functools.cache(lambda skewed=False: generated(skewed=skewed))


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-10)


MESHES = {
    "expert 4": MeshConfig(expert=4, capacity=4),
    "node 2, expert 2": MeshConfig(node=2, expert=2, capacity=4),
    "expert 8": MeshConfig(expert=8, capacity=8),
    "data 2, expert 4, ring": MeshConfig(data=2, expert=4, transport="ring"),
    "node 2, expert 2, two_hop": MeshConfig(
        node=2, expert=2, transport="two_hop", capacity=4
    ),
    "expert 8, ragged": MeshConfig(expert=8, transport="ragged"),
}
# With and without copies, plainly and with drafts, by two transports; others take long.
QUICK = {
    ("expert 4", 12, 1),
    ("node 2, expert 2, two_hop", None, 0),
    ("expert 8", 16, 0),
}


def ways():
    every = [
        (name, replicas, depth)
        for name, mesh in MESHES.items()
        for replicas in (None, 12 if mesh.node * mesh.expert == 4 else 16)
        for depth in (0, 1)
    ]
    assert set(every) >= QUICK
    return [
        pytest.param(*way, marks=[] if way in QUICK else pytest.mark.slow)
        for way in every
    ]


@pytest.mark.parametrize(("name", "replicas", "depth"), ways())
def test_greedy_output_is_that_of_one_device(name, replicas, depth):
    assert_same(generated(MESHES[name], replicas, depth), alone())


@pytest.mark.parametrize("replicas", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_so_it_is_when_all_tokens_want_the_same_experts(replicas):
    """At the usual capacity they do not have room: what does not go by the ring."""
    mesh = MeshConfig(expert=8, capacity=1.0)
    assert_same(generated(mesh, replicas, skewed=True), alone(skewed=True))


@pytest.mark.slow
def test_samples_are_those_of_one_device():
    got = generated(MESHES["expert 8"], 16, depth=2, rule=SAMPLED)
    want = generated(depth=2, rule=SAMPLED)
    assert_same(got, want)
    assert [row.accepted for row in got] == [row.accepted for row in want]


@pytest.mark.slow
def test_one_device_may_have_copies_too():
    got = generated(MeshConfig(), 11)
    assert_same(got, alone())


def test_the_loop_sends_tokens_to_experts_and_nothing_else():
    """Neither weights nor the cache are gathered, and each device has its share."""
    mesh = MeshConfig(node=2, expert=4, capacity=8)
    model, weights, _ = replica.built()
    model, weights = spread(model, weights, mesh, placement=placed(mesh, 16))
    state = engine.prefill(model, weights, [[1]] * 8, 12, depth=1)
    for leaf in jax.tree.leaves(state):
        assert leaf.addressable_shards[0].data.shape == (1, *leaf.shape[1:])
    moe = weights.blocks[-1][0]["moe"]
    for name in ("gate", "up", "down"):
        assert len(moe[name]) == 16
        assert len(moe[name].addressable_shards[0].data) == 2
    numbers = jax.device_put(np.zeros(8, np.int32), model.rt.placed)
    rule = jax.device_put(sampling(8), model.rt.placed)
    compiled = engine.advance.lower(
        model, weights, state, rule, numbers, jnp.zeros(4, jnp.int32), jnp.int32(1)
    ).compile()
    sent = hlo.collectives(compiled.as_text())
    exchanges = [each for each in sent if each.within("experts")]
    assert {each.kind for each in exchanges} == {"all-to-all"}
    assert any("while/body" in each.op_name for each in exchanges)
    # A token of each of 8 devices, as each of them might want it.
    assert max(each.bytes for each in exchanges) <= 8 * 2 * SMALL.dim * 4
    [done] = [each for each in sent if each not in exchanges]
    assert (done.kind, done.bytes) == ("all-reduce", 1)


def test_nothing_is_compiled_again_on_a_mesh():
    mesh = MESHES["expert 4"]
    model, weights, _ = replica.built()
    model, weights = spread(model, weights, mesh, devices=jax.devices()[:4])
    engine.extend.clear_cache(), engine.advance.clear_cache()
    for most in (5, 7):
        engine.generate(model, weights, prompts(), most)
    assert engine.extend._cache_size() == engine.advance._cache_size() == 1


def where_slots_go(model, weights, tokens):
    """The places [T, K] that each router of the main model sends tokens to."""

    def run(weights, tokens):
        seen = []

        def watch(*slots_and_weights, **how):
            seen.append(slots_and_weights[2])
            return model.rt.experts(*slots_and_weights, **how)

        rt = dataclasses.replace(model.rt, experts=watch)
        cache = caches.create(model.config, [tokens.shape[1]] * len(tokens))
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        how = position, cache, forward.attend_expanded
        forward.forward(model.clone(rt=rt), weights, tokens, *how)
        return seen

    return jax.tree.map(np.asarray, jax.jit(run)(weights, tokens))


def test_every_copy_of_an_expert_gets_its_share_of_tokens():
    model, weights, _ = replica.built()
    placement = placed(MeshConfig(), 16)
    model, weights = spread(model, weights, MeshConfig(), placement=placement)
    seen = where_slots_go(model, weights, jnp.asarray(replica.chain(8, 64, seed=2)))
    assert len(seen) == model.config.num_moe
    shares = []
    for router, place_TK in enumerate(seen):
        place_P = np.bincount(place_TK.reshape(-1), minlength=16)
        phy2log, counts_E = placement.phy2log[router], placement.counts[router]
        expert_E = np.bincount(phy2log, place_P, EXPERTS)
        assert expert_E.sum() == place_TK.size
        several = (counts_E[phy2log] > 1) & (expert_E[phy2log] >= 64)
        shares += list((place_P / (expert_E / counts_E)[phy2log])[several])
    assert len(shares) > 8
    assert min(shares) > 0.6 and max(shares) < 1.4


@pytest.fixture
def unready(monkeypatch):
    """Nothing may be started."""
    monkeypatch.setattr(engine, "prefill", pytest.fail)
    monkeypatch.setattr(expert, "spread", pytest.fail)


@pytest.mark.parametrize(
    ("mesh", "replicas", "message"),
    [
        ({"expert": 3}, None, "num_experts = 8: must be a multiple .* = 3"),
        ({"expert": 8}, 12, "placement of 12 places: must be a multiple .* = 8"),
        ({"expert": 2}, None, "make 2 devices: there are 8"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(mesh, replicas, message, unready):
    model, weights, _ = replica.built()
    placement = placed(MeshConfig(expert=4), replicas) if replicas else None
    with pytest.raises(ValueError, match=message):
        spread(model, weights, MeshConfig(**mesh), placement=placement)


def test_a_placement_of_another_model_is_refused(unready):
    model, weights, _ = replica.built()
    other = eplb.place(np.ones((2, EXPERTS)), 16, devices=8)
    with pytest.raises(ValueError, match=r"placement of \[2, 8\] .* \[5, 8\]"):
        spread(model, weights, MeshConfig(expert=8), placement=other)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (6, {}, "prompts: there are 6; must be a multiple of the 4 devices"),
        (8, {"page": 4}, "page = 4: must be 0 on a mesh of 4 devices"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(count, options, message, monkeypatch):
    model, weights, _ = replica.built()
    mesh = MESHES["expert 4"]
    model, weights = spread(model, weights, mesh, devices=jax.devices()[:4])
    monkeypatch.setattr(engine, "prefill", pytest.fail)
    with pytest.raises(ValueError, match=message):
        engine.generate(model, weights, prompts()[:count], 4, **options)
