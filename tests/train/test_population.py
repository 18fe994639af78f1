"""One program of many runs gives each run the numbers that it has alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deepseek_jax.config import (
    BalanceConfig,
    Config,
    MeshConfig,
    OptimConfig,
    PipelineConfig,
    RuntimeConfig,
    TrainConfig,
    flatten,
    to_dict,
)
from deepseek_jax.train import population
from deepseek_jax.train.state import assemble, init_state
from deepseek_jax.train.step import make_step
from tests.factory import SMALL, random_batch, small

STEPS = 50


def tiny(**groups) -> Config:
    """The least that has each kind of layer: a program to compile is what costs."""
    return small(
        model=dataclasses.replace(SMALL, num_layers=1, num_dense=0),
        **({"batch": 4, "length": 8} if "data" not in groups else {}),
        **groups,
    )


def runs(count: int = 4) -> list[Config]:
    """Some that differ in every scalar that strategy v3 reads, and in the seed."""
    each = []
    for i in range(count):
        optim = OptimConfig(
            lr=3e-3 * (1 + i),
            warmup=5,
            horizon=STEPS,
            weight_decay=0.1 * i,
            mtp_weight=0.1 * (1 + i),
            mtp_weight_changes=((20 + i, 0.1 * i),),
        )
        speed = 10.0 ** -(i + 1)
        balance = BalanceConfig(
            speed=speed, speed_changes=((40, speed / 3),), alpha=1e-3 * i
        )
        each.append(tiny(optim=optim, balance=balance, seed=i))
    return each


def batch(index: int, step: int):
    return random_batch(tiny(), seed=1000 * index + step, documents=step % 2 == 1)


def alone(config: Config, index: int, steps: int) -> tuple[list, list]:
    """A run's metrics, and its parameters and biases, by the step of a single run."""
    parts = assemble(config, jax.devices()[:1])
    step, state = make_step(parts), init_state(parts, config.seed)
    metrics = []
    for k in range(steps):
        state, told = step(state, batch(index, k))
        metrics.append(jax.device_get(told))
    return metrics, jax.device_get((state.params, state.balance))


def together(configs: list[Config], devices: int, each, steps: int) -> list:
    """The same of every run, by one program."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), (population.AXIS,))
    parts = [assemble(config, jax.devices()[:1]) for config in configs]
    states = population.stack(
        [init_state(p, c.seed) for p, c in zip(parts, configs, strict=True)]
    )
    values, states = jax.device_put(
        (population.stack([*map(population.scalars, configs)]), states),
        population.split(mesh),
    )
    step = population.make_step(configs[0], mesh, each)
    metrics = []
    for k in range(steps):
        rows = population.stack([batch(i, k) for i in range(len(configs))])
        states, told = step(values, states, rows)
        metrics.append(jax.device_get(told))
    take = population.taker(parts[0], mesh)
    found = []
    for i in range(len(configs)):
        of_i = [{name: x[i] for name, x in told.items()} for told in metrics]
        state = take(states, i)
        found.append((of_i, jax.device_get((state.params, state.balance))))
    return found


FORMS = {
    "one by one": (1, population.one_by_one),
    "vmap on two devices": (2, jax.vmap),
}


@functools.cache
def one_alone(index: int, wide: bool) -> tuple[list, list]:
    with jax.enable_x64(wide):
        return alone(runs()[index], index, STEPS)


@pytest.mark.parametrize(
    ("form", "count"),
    [
        ("one by one", 2),  # each run alone is one more program to compile
        *(pytest.param(form, 4, marks=pytest.mark.slow) for form in FORMS),
    ],
)
def test_a_population_equals_separate_runs_in_float64(form, count):
    expected = [one_alone(i, wide=True) for i in range(count)]
    with jax.enable_x64(True):
        found = together(runs(count), *FORMS[form], STEPS)
    for (metrics, state), (told, other) in zip(expected, found, strict=True):
        for before, after in zip(metrics, told, strict=True):
            for name in ("loss", "ce", "mtp_ce", "penalty", "grad_norm"):
                np.testing.assert_allclose(after[name], before[name], 1e-9, 1e-9)
            for name in ("load", "bias", "lr", "speed"):
                np.testing.assert_array_equal(after[name], before[name])
        near = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)
        jax.tree.map(near, other, state)
    lines = [[told["loss"] for told in metrics] for metrics, _ in expected]
    gaps = [abs(np.subtract(lines[0], line)).max() for line in lines[1:]]
    assert min(gaps) > 1e-3  # else nothing was told apart


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_in_float32_losses_stay_together(form):
    expected = [one_alone(i, wide=False) for i in range(len(runs()))]
    found = together(runs(), *FORMS[form], STEPS)
    gaps = [
        abs(after["loss"] - before["loss"])
        for (metrics, _), (told, _) in zip(expected, found, strict=True)
        for before, after in zip(metrics, told, strict=True)
    ]
    print(f"{form}: largest difference of a loss {max(gaps):.1e}")
    assert max(gaps) < 1e-3


@pytest.mark.slow
def test_scales_of_earlier_steps_are_each_runs_own():
    runtime = RuntimeConfig(compute="fp8_delayed", block=8)
    configs = [tiny(runtime=runtime, seed=seed) for seed in range(2)]
    expected = [alone(config, i, 3) for i, config in enumerate(configs)]
    found = together(configs, *FORMS["one by one"], 3)
    for (metrics, state), (told, other) in zip(expected, found, strict=True):
        for before, after in zip(metrics, told, strict=True):
            np.testing.assert_allclose(after["loss"], before["loss"], rtol=1e-5)
        near = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-4)
        jax.tree.map(near, other, state)


SPLIT = {"mesh.data": (MeshConfig(data=2), "none"), "schedule": (MeshConfig(), "gpipe")}


@pytest.mark.parametrize("case", SPLIT)
def test_a_run_of_more_than_a_device_is_refused(case):
    mesh, schedule = SPLIT[case]
    config = tiny(mesh=mesh, pipeline=PipelineConfig(schedule=schedule))
    with pytest.raises(ValueError, match="--vectorize"):
        population.check(config)


def test_every_scalar_is_a_number_that_a_program_can_take():
    config = runs()[1]
    values = population.scalars(config)
    assert {*values} == {*population.SCALARS}
    assert population.with_scalars(config, values).optim.lr == config.optim.lr
    assert config.optim.lr == 6e-3  # and the config is as it was
    assert {*population.SCALARS} - {*population.scalars(tiny())} == {
        "optim.mtp_weight_changes",
        "balance.speed_changes",
    }


def test_runs_that_differ_in_scalars_and_seed_are_a_team():
    other = tiny(train=TrainConfig(steps=11))
    longer = dataclasses.replace(
        other, balance=BalanceConfig(speed_changes=((1, 0.1), (2, 0.2)))
    )
    configs = [other, *runs(), longer, *runs(), other]
    assert population.teams(configs, 3) == [[0, 10], [1, 2, 3], [4, 6, 7], [5], [8, 9]]
    with pytest.raises(ValueError, match=r"train\.steps"):
        population.check_team([other, runs()[0]])


def test_every_field_is_a_scalar_or_a_teams_in_common():
    """A field that is in neither would be the first member's for all."""
    named = {name for name, _ in population.kind(tiny())} | {*population.SCALARS}
    assert named | {"seed"} == set(flatten(to_dict(tiny())))
