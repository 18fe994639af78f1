"""Finding checkpoints and what happened to their files, on hand-made folders."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from deepseek_jax.checkpoint.folders import (
    DIGESTS,
    choose,
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


@pytest.mark.parametrize("text", [None, "[]", "{}", "3", '{"state/a": 1}'])
def test_a_folder_that_is_no_checkpoint_is_damaged(root, text):
    (root / "11").mkdir()
    if text:
        (root / "11" / DIGESTS).write_text(text)
    assert find_damage(root / "11")
    assert newest_good(root) == 10


def test_a_file_that_cannot_be_read_is_not_damage(root, monkeypatch):
    def fail(path, *args, **kwargs):
        raise OSError(errno.EIO, "input/output error", str(path))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="input/output"):
        find_damage(root / "10")
    with pytest.raises(OSError, match="input/output"):
        newest_good(root)


def test_choose_takes_the_newest_good_or_what_is_asked_for(root):
    said = []
    truncate(root / "10" / "config" / "metadata")
    assert choose(root, say=said.append) == 3
    assert len(said) == 1 and f"{root / '10'} is damaged: config" in said[0]
    assert choose(root, 2) == 2
    with pytest.raises(ValueError, match=r"/10 is damaged: .*; step 3 is the newest"):
        choose(root, 10)
    assert choose(root / "nowhere") is None


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


def test_resolve_names_the_runs_of_a_sweep(root, tmp_path):
    for name in ("b", "a"):
        shutil.copytree(root, tmp_path / "sweep" / name / "checkpoints")
    (tmp_path / "sweep" / "c" / "checkpoints").mkdir(parents=True)  # of none yet
    with pytest.raises(ValueError, match=r"it has 2 runs, such as .*/sweep/a: give"):
        resolve(tmp_path / "sweep")


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
