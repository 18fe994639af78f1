"""Finding checkpoints and what happened to their files, on hand-made folders."""

import os
import shutil

import pytest

from deepseek_jax.checkpoint.folders import (
    DIGESTS,
    find_damage,
    newest_good,
    resolve,
    steps,
    write_digests,
)

FILES = ("state/_METADATA", "state/d/0", "data/metadata", "config/metadata")


@pytest.fixture
def root(tmp_path):
    for step in (2, 10, 3):
        for name in FILES:
            file = tmp_path / "checkpoints" / str(step) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode() * step)
        write_digests(tmp_path / "checkpoints" / str(step))
    return tmp_path / "checkpoints"


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_any_damaged_file_is_found_and_named(root, harm, name):
    assert find_damage(root / "10") is None
    harm(root / "10" / name)
    assert name in find_damage(root / "10")
    assert newest_good(root) == 3


@pytest.mark.parametrize("harm", [truncate, flip, os.remove])
def test_damaged_digests_are_found(root, harm):
    harm(root / "10" / DIGESTS)
    assert find_damage(root / "10") is not None


def test_a_folder_that_is_no_checkpoint_is_damaged(root):
    (root / "11").mkdir()
    (root / "12").mkdir()
    (root / "12" / DIGESTS).write_text("[]")
    assert find_damage(root / "11") and find_damage(root / "12")
    assert newest_good(root) == 10


def test_steps_are_numbers_in_order(root):
    (root / "4.orbax-checkpoint-tmp").mkdir()
    (root / "5.damaged").mkdir()
    (root / "6").write_text("a file")
    assert steps(root) == [2, 3, 10]
    assert steps(root / "nowhere") == []
    assert newest_good(root / "nowhere") is None


def test_resolve_takes_a_workdir_its_checkpoints_or_one_step(root, monkeypatch):
    assert resolve(root.parent) == (root, None)
    assert resolve(str(root)) == (root, None)
    assert resolve(root / "2") == (root, 2)
    monkeypatch.chdir(root.parent)
    assert resolve(".") == (root, None)
    assert resolve("checkpoints/3") == (root, 3)


def test_resolve_takes_a_workdir_whose_name_is_a_number(root, tmp_path):
    shutil.copytree(root, tmp_path / "7" / "checkpoints")
    assert resolve(tmp_path / "7") == (tmp_path / "7" / "checkpoints", None)


@pytest.mark.parametrize(
    "path, message",
    [
        ("checkpoints/7", r"checkpoints/7 is not there; .* steps \[2, 3, 10\]"),
        ("nowhere", r"nowhere is not there: give a workdir"),
        ("checkpoints/2/state", "holds no checkpoint"),
        ("checkpoints/2/state/d/0", "holds no checkpoint"),
    ],
)
def test_resolve_says_what_is_wrong(root, path, message):
    with pytest.raises(ValueError, match=message):
        resolve(root.parent / path)
