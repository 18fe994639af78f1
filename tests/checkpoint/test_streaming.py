"""Arrays written slice by slice are what the manager restores, and the other way."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint import disk, folders, manager
from deepseek_jax.checkpoint.streaming import Reader, Spec, Writer, check_room, leaves

BF16 = np.dtype(jnp.bfloat16)
F32 = np.dtype(np.float32)
RNG = np.random.default_rng(0)
STACK = RNG.normal(size=(2, 3, 5, 7)).astype(BF16)
TABLE = RNG.normal(size=(10, 4)).astype(F32)
STATE = {
    "step": np.asarray(3, np.int32),
    "params": {
        "stack": Spec(STACK.shape, BF16, (1, 1, 5, 4)),
        "inner": {"table": Spec(TABLE.shape, F32, (4, 4)), "one": np.ones(2, F32)},
    },
    "balance": (Spec((2, 3), F32, (1, 3)), ()),
}


@pytest.fixture
def step_dir(tmp_path):
    step_dir = tmp_path / "checkpoints" / "3"
    with Writer(step_dir, STATE, {"about": "it"}) as writer:
        for layer, expert in np.ndindex(2, 3):
            for columns in (slice(4, 7), slice(0, 4)):
                index = (layer, expert, slice(None), columns)
                writer.write(("params", "stack"), index, STACK[index])
        for start in (8, 0, 4):
            rows = slice(start, min(start + 4, 10))
            writer.write(("params", "inner", "table"), (rows,), TABLE[rows])
        for layer in range(2):
            writer.write(("balance", "0"), (layer,), np.full(3, layer, F32))
    return step_dir


def test_the_manager_restores_what_was_streamed(step_dir):
    like = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": {
            "stack": jax.ShapeDtypeStruct(STACK.shape, jnp.float32),
            "inner": {
                "table": jax.ShapeDtypeStruct(TABLE.shape, jnp.float32),
                "one": jax.ShapeDtypeStruct((2,), jnp.float32),
            },
        },
        "balance": (jax.ShapeDtypeStruct((2, 3), jnp.float32), ()),
    }
    restored = manager.restore(step_dir.parent, like)
    assert restored.config == {"about": "it"} and restored.state["step"] == 3
    params = restored.state["params"]
    np.testing.assert_array_equal(params["stack"], STACK.astype(F32))
    np.testing.assert_array_equal(params["inner"]["table"], TABLE)
    np.testing.assert_array_equal(restored.state["balance"][0], [[0] * 3, [1] * 3])
    assert restored.state["balance"][1] == ()


def test_slices_are_read_back(step_dir):
    reader = Reader(step_dir)
    assert reader.shapes == {
        ("step",): (),
        ("params", "stack"): STACK.shape,
        ("params", "inner", "table"): TABLE.shape,
        ("params", "inner", "one"): (2,),
        ("balance", "0"): (2, 3),
    }
    got = reader.read(("params", "stack"), (1, 2, slice(1, 3)))
    assert got.dtype == BF16
    np.testing.assert_array_equal(got, STACK[1, 2, 1:3])
    np.testing.assert_array_equal(reader.read(("params", "inner", "table")), TABLE)


def test_slices_of_a_training_checkpoint_are_read(tmp_path):
    state = {"params": {"stack": jnp.asarray(STACK)}, "balance": (jnp.ones(3), ())}
    with manager.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, state, {}, {})
    reader = Reader(tmp_path / "checkpoints" / "5")
    assert reader.shapes == {("params", "stack"): STACK.shape, ("balance", "0"): (3,)}
    np.testing.assert_array_equal(reader.read(("params", "stack"), (1, 2)), STACK[1, 2])


def test_a_training_checkpoint_stores_layers_and_experts_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "CHUNK", 5 * 7 * 2)
    with manager.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, {"stack": jnp.asarray(STACK)}, {}, {})
    reader = Reader(tmp_path / "checkpoints" / "5")
    chunk = reader.array(("stack",)).chunk_layout.read_chunk.shape
    assert chunk == (1, 1, 5, 7)
    np.testing.assert_array_equal(reader.read(("stack",)), STACK)


def test_damage_is_found(step_dir):
    assert folders.find_damage(step_dir) is None
    chunk = step_dir / "state" / "params.stack" / "1.2.0.0"
    chunk.unlink()
    assert "params.stack/1.2.0.0 is missing" in folders.find_damage(step_dir)


def test_a_step_that_was_not_finished_has_no_digests(tmp_path):
    with (
        pytest.raises(KeyError),
        Writer(tmp_path / "3", STATE, {}) as writer,
    ):
        writer.write(("params", "absent"), (), TABLE)
    assert folders.find_damage(tmp_path / "3") is not None


def test_a_spec_counts_whole_chunks():
    assert Spec((10, 4), F32, (4, 4)).size == 12 * 4 * 4


def test_leaves_have_the_names_of_their_keys():
    tree = SimpleNamespace()
    assert leaves({"a": (tree, {"b": 1})}) == {("a", "0"): tree, ("a", "1", "b"): 1}


def test_room_is_checked(tmp_path, monkeypatch):
    check_room(tmp_path, 1000)
    free = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(disk.DiskFull, match="2 MB are needed, 1 MB are free at"):
        check_room(tmp_path, 2_000_000)
