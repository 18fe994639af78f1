"""One step: a golden first one, accumulation, clipping, what a gradient may touch."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax.config import (
    BalanceConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from deepseek_jax.train.state import assemble, init_state, shardings
from deepseek_jax.train.step import compile_step, make_step, micro_batches
from tests.factory import as_f64, random_batch, small

GOLDEN = Path(__file__).parent.parent / "golden" / "first_step.json"


def first_steps(config, count=2):
    with jax.enable_x64(True):
        parts = assemble(config)
        state = as_f64(init_state(parts, 0))
        step, records = make_step(parts), []
        for i in range(count):
            state, metrics = step(state, random_batch(config, seed=i))
            records.append({k: np.asarray(v).tolist() for k, v in metrics.items()})
        return jax.tree.map(np.asarray, state), records


def test_first_steps_are_golden():
    """If the mathematics was meant to change, write `records` to tests/golden and say
    why.
    """
    _, records = first_steps(small(depth=2))
    golden = json.loads(GOLDEN.read_text())
    for got, want in zip(records, golden, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("accumulation", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing(accumulation):
    base = small(depth=2)
    split = dataclasses.replace(base, train=TrainConfig(accumulation=accumulation))
    (want, records), (got, others) = first_steps(base, 3), first_steps(split, 3)
    np.testing.assert_allclose(records[-1]["loss"], others[-1]["loss"], rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), want, got)


def test_micro_batches_stride_over_rows():
    config = small(batch=8)
    batch = random_batch(config)
    tokens = micro_batches(batch, 4).tokens
    assert tokens.shape[:2] == (4, 2)
    np.testing.assert_array_equal(tokens[1], batch.tokens[[1, 5]])


def test_the_bias_is_no_parameter_and_decays_not():
    """With u = 0 and a huge decay the bias stays; no optimizer leaf has its shape."""
    config = small(
        optim=OptimConfig(
            lr=0.1, schedule="constant", warmup=0, horizon=9, weight_decay=5.0
        ),
        balance=BalanceConfig(strategy="loss_free", speed=0.0),
    )
    parts = assemble(config)
    state = init_state(parts, 0)
    bias = jax.tree.map(lambda b: b + 0.7, state.balance)
    state, _ = make_step(parts)(state._replace(balance=bias), random_batch(config))
    for leaf in jax.tree.leaves(state.balance):
        np.testing.assert_array_equal(leaf, np.float32(0.7))
    shapes = {leaf.shape for leaf in jax.tree.leaves((state.params, state.opt_state))}
    assert (config.model.num_routers, config.model.moe.num_experts) not in shapes


def test_bf16_compute_stays_near_f32_and_leaves_the_router_alone():
    """8 bits an operand, and some tokens change experts: losses move by some 2e-3."""
    base = small(batch=8, length=32)
    losses = {"f32": [], "bf16": []}
    for compute, seen in losses.items():
        runtime = RuntimeConfig(block=8, compute=compute)
        parts = assemble(dataclasses.replace(base, runtime=runtime))
        step, start = make_step(parts), jax.device_get(init_state(parts, 0))
        for seed in range(6):
            batch = random_batch(base, seed=seed)
            state, metrics = step(jax.device_put(start, shardings(parts, start)), batch)
            seen.append(float(metrics["ce"]))
        for leaf in jax.tree.leaves((state.params, state.balance, metrics["bias"])):
            assert leaf.dtype == np.float32
    difference = np.array(losses["bf16"]) / np.array(losses["f32"]) - 1
    assert 1e-5 < np.sqrt(np.mean(difference**2)) < 1e-2


def test_the_step_does_not_recompile():
    config = small()
    parts = assemble(config)
    state, step = init_state(parts, 0), make_step(parts)
    for i in range(3):
        state, _ = step(state, random_batch(config, seed=i))
    assert step._cache_size() == 1


def test_the_model_learns_a_repeated_batch():
    config = small()
    parts = assemble(config)
    state, step, batch = init_state(parts, 0), make_step(parts), random_batch(small())
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["ce"]))
    assert losses[-1] < losses[0] / 2


def test_what_remat_drops_is_not_kept():
    """Compiled memory falls from all to the products alone to nothing of a block."""
    base, sizes = small(batch=8, length=64), []
    for remat in ("none", "products", "full"):
        runtime = RuntimeConfig(block=8, remat=remat)
        parts = assemble(dataclasses.replace(base, runtime=runtime))
        state = jax.eval_shape(lambda parts=parts: init_state(parts, 0))
        compiled = compile_step(parts, state, random_batch(base))
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    none, products, full = sizes
    assert none > 1.2 * products > 1.2 * full


def test_a_step_that_is_not_finite_changes_nothing_nor_do_later_ones():
    config = small()
    parts = assemble(config)
    step, batch = make_step(parts), random_batch(config)
    state, _ = step(init_state(parts, 0), batch)
    head = np.array(state.params["head"])
    broken = state._replace(
        params=state.params | {"head": state.params["head"].at[0, 0].set(np.inf)}
    )
    before = jax.tree.map(np.array, broken)
    after, metrics = step(broken, batch)
    assert not np.isfinite(metrics["loss"])
    assert after.step == -2  # one was done
    # A finite one, dispatched before the loss was read.
    mended = after._replace(params=after.params | {"head": head})
    later, metrics = step(mended, random_batch(config, seed=1))
    assert np.isfinite(metrics["loss"])
    assert later.step == -2
    np.testing.assert_array_equal(later.params["head"], head)
    rest = [
        state._replace(step=0, params=state.params | {"head": 0})
        for state in (before, later)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), *rest)
