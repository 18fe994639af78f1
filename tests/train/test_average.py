"""The parameters' mean: a plain loop's numbers, kept behind the steps and over stops.

Most runs are those of `test_loop`'s toy step, whose parameters of every step are kept.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax
from deepseek_jax import train
from deepseek_jax.checkpoint import disk, folders, manager
from deepseek_jax.config import (
    DataConfig,
    MeshConfig,
    MTPConfig,
    OptimConfig,
    TrainConfig,
)
from deepseek_jax.train import average, loop, population, start
from deepseek_jax.train.average import Average
from deepseek_jax.train.state import TrainState, shardings
from deepseek_jax.train.step import compile_step
from deepseek_jax.train.writers import read
from tests.factory import SMALL, small
from tests.train import test_loop
from tests.train.corpus import write_corpus
from tests.train.test_loop import Crash, crash_at, final_params, losses

DECAY = 0.9


def plain(decay, start, later):
    """The definition, array by array."""
    mean = np.float32(start)
    for new in later:
        mean = np.float32(decay) * mean + np.float32(1 - decay) * np.float32(new)
    return mean


def config(ema=DECAY, **fields):
    made = test_loop.config(**fields)
    return dataclasses.replace(made, optim=dataclasses.replace(made.optim, ema=ema))


def open_run(config, workdir):
    opened = test_loop.open_run(config, workdir)

    def evaluate(state, step, mean=None):
        record = opened.evaluate(state, step)
        if mean is not None:
            record["eval_ce_average"] = float(mean["w"].sum())
        return record

    return opened._replace(evaluate=evaluate)


def keep(monkeypatch, compile_step):
    """{step: parameters} from before the first step on, filled as steps are taken."""
    seen = {}

    def compiled(*args):
        step = compile_step(*args)

        def kept(state, batch):
            seen.setdefault(int(state.step), jax.tree.map(np.array, state.params))
            after, metrics = step(state, batch)
            seen[int(after.step)] = jax.tree.map(np.array, after.params)
            return after, metrics

        return kept

    monkeypatch.setattr(loop, "compile_step", compiled)
    return seen


@pytest.fixture
def seen(monkeypatch):
    """The toy in place of the model, and its parameters by their steps."""
    monkeypatch.setattr(start, "open_run", open_run)
    monkeypatch.setattr(start, "init_state", test_loop.init_state)
    return keep(monkeypatch, test_loop.compile_step)


def saved_mean(workdir, step=12):
    like = {"w": np.zeros(3, np.float32)}
    mean = manager.restore_average(workdir / "checkpoints", step, like)
    return mean and mean["w"]


def expected(seen, decay, first, last):
    """From the parameters after step `first` on."""
    start, *later = (seen[k]["w"] for k in range(first, last + 1))
    return plain(decay, start, later)


def test_the_mean_is_that_of_a_plain_loop_and_the_run_is_as_without(tmp_path, seen):
    without = train.run(config(0.0), tmp_path / "without")
    assert saved_mean(tmp_path / "without") is None
    alone = dict(seen)
    records = losses(train.run(config(), tmp_path / "with"))
    for step in (8, 12):
        mean = saved_mean(tmp_path / "with", step)
        assert mean.tobytes() == expected(seen, DECAY, 0, step).tobytes()
    assert all(alone[k]["w"].tobytes() == seen[k]["w"].tobytes() for k in range(1, 13))
    means = [r.pop("eval_ce_average") for r in records if "eval_ce" in r]
    assert means == [float(jnp.sum(expected(seen, DECAY, 0, k))) for k in (6, 12)]
    assert records == losses(without)


@pytest.mark.parametrize("step", [3, 5, 9, 12])
def test_a_crash_at_any_step_changes_nothing(tmp_path, seen, step):
    train.run(config(), tmp_path / "whole")
    with pytest.raises(Crash):
        train.run(config(), tmp_path / "run", crash_at(step))
    train.run(config(), tmp_path / "run")
    both = [tmp_path / name for name in ("whole", "run")]
    whole, run = (losses(read(workdir / "metrics.jsonl")) for workdir in both)
    assert whole == run
    assert len({saved_mean(workdir).tobytes() for workdir in both}) == 1
    assert len({final_params(workdir).tobytes() for workdir in both}) == 1


def test_a_mean_may_begin_and_end_later_but_keeps_its_decay(tmp_path, seen):
    train.run(config(0.0, steps=4), tmp_path)
    train.run(config(0.9, steps=6), tmp_path)
    assert saved_mean(tmp_path, 6).tobytes() == expected(seen, 0.9, 4, 6).tobytes()
    with pytest.raises(ValueError, match=r"optim\.ema = 0\.9 there, 0\.5 here"):
        train.run(config(0.5, steps=8), tmp_path)
    train.run(config(0.9, steps=8), tmp_path)
    assert saved_mean(tmp_path, 8).tobytes() == expected(seen, 0.9, 4, 8).tobytes()
    train.run(config(0.0, steps=10), tmp_path)
    assert saved_mean(tmp_path, 10) is None
    train.run(config(0.5, steps=12), tmp_path)
    assert saved_mean(tmp_path, 12).tobytes() == expected(seen, 0.5, 10, 12).tobytes()


def test_fewer_steps_than_were_done_are_evaluated_with_their_mean(tmp_path, seen):
    train.run(config(steps=6), tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    [record] = train.run(config(steps=5), tmp_path)
    mean = expected(seen, DECAY, 0, 6)
    assert record["eval_ce_average"] == float(jnp.sum(mean))


def test_what_the_thread_meets_stops_the_run(tmp_path, seen, monkeypatch):
    def fail(self, params):
        raise MemoryError("no room for the mean")

    monkeypatch.setattr(Average, "_add", fail)
    with pytest.raises(MemoryError, match="no room for the mean"):
        train.run(config(), tmp_path)
    assert max(seen) == 2 and folders.steps(tmp_path / "checkpoints") == []


def test_a_lost_mean_is_damage(tmp_path, seen):
    train.run(config(), tmp_path)
    folder = tmp_path / "checkpoints" / "12"
    assert folders.find_damage(folder) is None
    shutil.rmtree(folder / folders.AVERAGE)
    assert "average" in folders.find_damage(folder)


def test_room_on_the_disk_is_asked_for_the_mean_too(tmp_path, seen, monkeypatch):
    asked = []
    monkeypatch.setattr(disk, "check_space", lambda *args: asked.append(args))
    for ema in (0.0, DECAY):
        start.check(open_run(config(ema), tmp_path), tmp_path)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(like)) for _, like, _ in asked]
    assert sizes[1] == sizes[0] + 3


def test_a_save_is_not_touched_by_later_updates(tmp_path):
    state = {"w": jnp.ones(2**22)}
    mean = Average(0.5, state)
    with manager.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {}, average=mean.value())
        for _ in range(5):
            mean.update({"w": jnp.zeros(2**22)})
        mean.wait()
    mean.close()
    assert (manager.restore_average(tmp_path, 1, state)["w"] == 1).all()
    assert (mean.mean["w"] == 2.0**-5).all()


def test_arrays_split_over_devices_that_every_step_donates():
    mesh = jax.make_mesh((4,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    split, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("fsdp",), ())
    )
    rng = np.random.default_rng(0)
    first = {"a": rng.normal(size=(4096, 64)), "b": rng.normal(size=7), "c": {}}
    where = {"a": split, "b": whole, "c": {}}
    params = jax.device_put(jax.tree.map(np.float32, first), where)
    kept = [jax.tree.map(np.array, params)]
    step = jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.sin(3 * x), tree), donate_argnums=0
    )
    mean = Average(DECAY, params)
    for _ in range(20):
        params = step(params)
        mean.update(params)
    for _ in range(20):
        kept.append(jax.tree.map(np.array, step(jax.device_put(kept[-1], where))))
    copied, placed = average._copy(params), mean.placed(params)
    mean.close()
    for name in ("a", "b"):
        found = plain(DECAY, kept[0][name], [k[name] for k in kept[1:]])
        assert mean.mean[name].tobytes() == found.tobytes()
        assert np.asarray(placed[name]).tobytes() == found.tobytes()
        assert placed[name].sharding == copied[name].sharding == where[name]


def test_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"optim\.ema = 0\.9: must be 0 .*vectorize"):
        population.check(config())
    average.check(config())
    monkeypatch.setattr(average.processes, "several", lambda: True)
    average.check(config(0.0))
    with pytest.raises(ValueError, match=r"optim\.ema = 0\.9: must be 0 with several"):
        average.check(config())


MESHES = [{}, pytest.param({"fsdp": 4, "expert": 2}, marks=pytest.mark.slow)]


@pytest.mark.parametrize("mesh", MESHES, ids=["one", "mesh"])
def test_a_model_and_what_load_gives(tmp_path, monkeypatch, mesh):
    monkeypatch.setenv("DEEPSEEK_JAX_CACHE", str(tmp_path / "cache"))
    source, opened = str(write_corpus(tmp_path / "corpus", 60)), []
    open_real = start.open_run
    monkeypatch.setattr(
        start, "open_run", lambda *args: opened.append(open_real(*args)) or opened[0]
    )
    seen = keep(monkeypatch, compile_step)
    config = small(
        model=dataclasses.replace(SMALL, vocab_size=264, mtp=MTPConfig()),
        data=DataConfig(source=source, tokenizer="bytes", batch=8, length=16),
        optim=OptimConfig(lr=1e-2, warmup=0, horizon=100, ema=DECAY),
        train=TrainConfig(steps=3),
        mesh=MeshConfig(**mesh),
    )
    record = train.run(config, tmp_path / "run")[-1]
    _, params, balance, _ = deepseek_jax.load(tmp_path / "run", average=True)
    found = jax.tree.map(
        lambda *leaves: plain(DECAY, leaves[0], leaves[1:]),
        *(seen[k] for k in range(4)),
    )
    jax.tree.map(np.testing.assert_array_equal, params, found)
    _, last, _, _ = deepseek_jax.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, last, seen[3])

    [run] = opened
    for name, tree in (("eval_ce_average", params), ("eval_ce", last)):
        state = TrainState(jnp.int32(3), tree, (), balance, jax.random.PRNGKey(0), {})
        state = jax.device_put(state, shardings(run.parts, state))
        again = run.evaluate(state, 3)["eval_ce"]
        assert record[name] == pytest.approx(again, rel=1e-6)
    assert abs(record["eval_ce_average"] - record["eval_ce"]) > 1e-3

    with manager.Checkpoints(tmp_path / "without" / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {}, run.description)
    with pytest.raises(
        ValueError, match=r"average = True: .*without/checkpoints/3 hold"
    ):
        deepseek_jax.load(tmp_path / "without", average=True)
