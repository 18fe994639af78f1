"""Saving, restoring, falling back, and a full disk, on a state of odd leaves."""

import errno
import os
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint import disk, folders, manager
from deepseek_jax.checkpoint.disk import DiskFull
from deepseek_jax.checkpoint.folders import steps
from deepseek_jax.checkpoint.manager import Checkpoints, restore


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    balance: tuple
    key: jax.Array


def state_at(step):
    key = jax.random.fold_in(jax.random.PRNGKey(3), step)
    params = {
        "w": jax.random.normal(key, (64, 65)),
        "half": jax.random.normal(key, (7,), jnp.bfloat16),
        "empty": {},
    }
    return State(
        jnp.asarray(step, jnp.int32),
        params,
        ((), {"mu": params["w"] ** 2}),
        (params["w"],),
        key,
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(root, upto, eval_ces=None, **options):
    with Checkpoints(root, **options) as checkpoints:
        for step in range(1, upto + 1):
            eval_ce = eval_ces[step - 1] if eval_ces else None
            checkpoints.save(
                step, state_at(step), {"lane": step}, {"seed": step}, eval_ce=eval_ce
            )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    save(root, 3, keep_last=3)
    return root


@pytest.fixture
def root(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


class Scaled(NamedTuple):
    """A state with one field more."""

    step: jax.Array
    params: dict
    opt_state: tuple
    balance: tuple
    key: jax.Array
    scales: dict


NO_SCALES: dict = {}
SCALES = {"moe.q_a.kernel": jnp.full((2, 3), 5.0), "moe.gate": jnp.ones(3)}
FRESH = {"moe.q_a.kernel": jnp.zeros((2, 3)), "moe.gate": jnp.zeros(3)}


@pytest.mark.parametrize(
    "stored, own, kept",
    [
        (SCALES, FRESH, True),
        (NO_SCALES, NO_SCALES, True),
        (None, FRESH, False),
        (None, NO_SCALES, False),
        (NO_SCALES, FRESH, False),
        (SCALES, NO_SCALES, False),
        (SCALES, {k: jnp.zeros((2, *v.shape)) for k, v in FRESH.items()}, False),
        (SCALES, {"moe.gate": jnp.zeros(3)}, False),
    ],
)
def test_an_optional_field_comes_back_where_it_fits(stored, own, kept, tmp_path):
    state = state_at(7) if stored is None else Scaled(*state_at(7), stored)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state, {}, {})
    like = Scaled(*state_at(0), own)
    got = restore(tmp_path / "checkpoints", like, optional=("scales",)).state
    assert_same(got, Scaled(*state_at(7), stored if kept else own))


def test_only_what_is_optional_may_differ(saved):
    like = Scaled(*state_at(0), NO_SCALES)
    less = like._replace(params={"w": like.params["w"]})
    with pytest.raises(ValueError, match="has params/half, which this state has not"):
        restore(saved, less, optional=("scales",))
    more = like._replace(params={**like.params, "v": jnp.zeros(3)})
    with pytest.raises(ValueError, match="has no params/v"):
        restore(saved, more, optional=("scales",))


def test_a_checkpoint_comes_back_bit_for_bit(saved):
    restored = restore(saved, state_at(0))
    assert restored.step == 3
    assert (restored.data, restored.config) == ({"lane": 3}, {"seed": 3})
    assert_same(restored.state, state_at(3))
    assert_same(restore(saved, state_at(0), step=2).state, state_at(2))
    abstract = jax.eval_shape(lambda: state_at(0))
    np.testing.assert_array_equal(restore(saved, abstract).state.key, state_at(3).key)


def test_shardings_are_those_asked_for(saved):
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = state_at(0)
    like.params["w"] = jax.device_put(like.params["w"], sharding)
    restored = restore(saved, like).state.params["w"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, state_at(3).params["w"])


def test_a_part_of_the_state_can_be_restored(saved):
    like, expected = state_at(0), state_at(3)
    wanted = {"params": like.params, "balance": like.balance}
    restored = restore(saved, wanted, partial=True).state
    assert_same(restored, {"params": expected.params, "balance": expected.balance})


def test_a_part_that_is_not_there_is_named(saved):
    wanted = {"params": {**state_at(0).params, "v": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="has no params/v"):
        restore(saved, wanted, partial=True)


def test_a_save_is_not_touched_by_steps_that_donate_the_state(tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jnp.zeros((512, 1024))}
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        for step in range(1, 4):
            state = add(state)
            checkpoints.save(step, state, {}, {})
            for _ in range(5):
                state = add(state)
    for step, value in ((1, 1.0), (2, 7.0), (3, 13.0)):
        restored = restore(tmp_path, {"w": jnp.zeros((512, 1024))}, step=step)
        assert (np.asarray(restored.state["w"]) == value).all()


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, 6, [3.0, 1.0, 2.0, None, 4.0, None], keep_last=2, keep_best=1)
    assert steps(tmp_path) == [2, 5, 6]


def test_the_best_is_kept_after_a_restart(tmp_path):
    save(tmp_path, 4, [3.0, 1.0, 2.0, 4.0], keep_last=2, keep_best=1)
    assert steps(tmp_path) == [2, 3, 4]
    for step in (5, 6):
        with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
            checkpoints.save(step, state_at(step), {}, {}, eval_ce=1.5)
    assert steps(tmp_path) == [2, 5, 6]
    assert_same(restore(tmp_path, state_at(0), step=2).state, state_at(2))
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        checkpoints.save(7, state_at(7), {}, {}, eval_ce=0.5)
    assert steps(tmp_path) == [6, 7]


def test_a_damaged_metric_is_damage_and_no_obstacle(tmp_path):
    save(tmp_path, 3, [3.0, 1.0, 2.0], keep_last=3)
    truncate(tmp_path / "1" / "metrics" / "metrics")
    assert "metrics/metrics" in folders.find_damage(tmp_path / "1")
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        checkpoints.save(4, state_at(4), {}, {}, eval_ce=5.0)
    assert steps(tmp_path) == [2, 3, 4]


def test_no_checkpoint_is_none(tmp_path):
    assert restore(tmp_path / "none", state_at(0)) is None
    with Checkpoints(tmp_path):
        assert restore(tmp_path, state_at(0)) is None


def files(step_dir):
    return sorted(f for f in step_dir.rglob("*") if f.is_file())


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, os.remove])
def test_damage_falls_back_to_the_newest_good_one(root, harm):
    biggest = max(files(root / "3"), key=lambda f: f.stat().st_size)
    harm(biggest)
    shutil.rmtree(root / "2" / "state")
    said = []
    restored = restore(root, state_at(0), say=said.append)
    assert restored.step == 1
    assert_same(restored.state, state_at(1))
    assert len(said) == 2 and f"{root / '3'} is damaged" in said[0]
    assert steps(root) == [1, 2, 3]
    with Checkpoints(root, say=said.append) as checkpoints:
        assert f"{root / '2'} renamed to 2.damaged" in said[2] and len(said) == 4
        assert steps(root) == [1]
        assert (root / "3.damaged").is_dir() and (root / "2.damaged").is_dir()
        checkpoints.save(2, state_at(2), {}, {})
    assert steps(root) == [1, 2]
    assert restore(root, state_at(0)).step == 2


def test_half_written_checkpoints_are_passed_over_and_removed(root):
    os.rename(root / "3", root / "3.orbax-checkpoint-tmp")
    shutil.copytree(
        root / "1", root / "4", ignore=shutil.ignore_patterns("digests.json")
    )
    said = []
    restored = restore(root, state_at(0), say=said.append)
    assert restored.step == 2 and "digests.json" in said[0]
    with Checkpoints(root):
        assert restore(root, state_at(0)).step == 2
    assert sorted(p.name for p in root.iterdir()) == ["1", "2", "4.damaged"]


def test_reading_leaves_a_running_training_alone(root):
    os.rename(root / "3", root / "3.orbax-checkpoint-tmp")
    truncate(root / "2" / folders.DIGESTS)
    before = sorted(root.rglob("*"))
    assert restore(root, state_at(0)).step == 1
    assert folders.newest_good(root) == 1
    assert manager.read_config(root) == {"seed": 1}
    assert sorted(root.rglob("*")) == before


def test_no_good_checkpoint_is_an_error_and_nothing_is_lost(root):
    for step in (1, 2, 3):
        truncate(root / str(step) / "config" / "metadata")
    before = sorted(root.rglob("*"))
    with pytest.raises(
        ValueError, match=r"can be restored: step 3: .* step 2: .* step 1"
    ) as error:
        restore(root, state_at(0))
    assert "emove" not in str(error.value)
    assert sorted(root.rglob("*")) == before


def test_a_damaged_step_that_was_asked_for_is_named_with_the_newest_good(root):
    truncate(root / "3" / "config" / "metadata")
    for read in (
        lambda: restore(root, state_at(0), step=3),
        lambda: manager.read_config(root, 3),
    ):
        with pytest.raises(
            ValueError, match=r"checkpoints/3 is damaged: config/metadata .*step 2 is"
        ) as error:
            read()
        assert "emove" not in str(error.value)
    assert restore(root, state_at(0), step=1).step == 1


def test_a_step_that_lacks_an_item_is_damaged(root):
    shutil.rmtree(root / "3" / "state")
    folders.write_digests(root / "3")
    said = []
    assert restore(root, state_at(0), say=said.append).step == 2
    assert len(said) == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad"), MemoryError()])
def test_an_error_in_reading_says_nothing_against_a_checkpoint(
    root, error, monkeypatch
):
    whole = manager.ocp.Checkpointer.restore

    def fail(reader, path, *, args):
        if "state" in args:
            raise error
        return whole(reader, path, args=args)

    before = sorted(root.rglob("*"))
    monkeypatch.setattr(manager.ocp.Checkpointer, "restore", fail)
    with pytest.raises(type(error)):
        restore(root, state_at(0), say=pytest.fail)
    monkeypatch.undo()
    with Checkpoints(root, say=pytest.fail):
        assert steps(root) == [1, 2, 3]
    assert sorted(root.rglob("*")) == before


def test_a_state_of_another_form_is_no_damage(root):
    like = state_at(0)
    like.params["another"] = jnp.zeros(3)
    with pytest.raises(ValueError, match="another"):
        restore(root, like, say=pytest.fail)
    assert steps(root) == [1, 2, 3]


def test_another_config_is_refused_before_anything_is_read(root):
    def accept(config):
        raise ValueError(f"seed {config['seed']}")

    with pytest.raises(ValueError, match="seed 3"):
        restore(root, state_at(0), accept=accept)


def test_too_small_a_disk_is_refused_before_the_start(tmp_path, monkeypatch):
    state = {"w": np.zeros(1000, np.float32)}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 15_999)
    )
    root = tmp_path / "run" / "checkpoints"
    with pytest.raises(DiskFull, match=r"4 checkpoints of 0 MB .*train\.keep_last"):
        disk.check_space(root, state, 3)
    assert not root.parent.exists()
    root.mkdir(parents=True)
    (root / "old").write_bytes(b"x")  # what earlier checkpoints hold will be freed
    disk.check_space(root, state, 3)


def test_a_full_disk_stops_with_the_last_checkpoint_named(root, monkeypatch):
    monkeypatch.setattr(
        manager,
        "write_digests",
        lambda folder: os.write(os.open("/dev/full", os.O_WRONLY), b"x"),
    )
    full = pytest.raises(DiskFull, match=r"step 4 .*step 3 is the last")
    with full as error, Checkpoints(root) as checkpoints:
        checkpoints.save(4, state_at(4), {}, {})
    assert error.value.__cause__.errno == errno.ENOSPC
    monkeypatch.undo()
    assert restore(root, state_at(0)).step == 3
    assert not list(root.glob("*tmp*"))


def test_other_errors_of_a_save_are_not_hidden(root, monkeypatch):
    def fail(folder):
        raise RuntimeError("something else")

    monkeypatch.setattr(manager, "write_digests", fail)
    with (
        pytest.raises(RuntimeError, match="something else"),
        Checkpoints(root) as checkpoints,
    ):
        checkpoints.save(4, state_at(4), {}, {})
