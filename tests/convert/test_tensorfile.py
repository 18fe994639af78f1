"""The safetensors format against its own package, and damaged files."""

import json

import numpy as np
import pytest

from deepseek_jax.convert.tensorfile import Plan, TensorFile, read_header
from tests.convert import released

RNG = np.random.default_rng(0)
TENSORS = {
    "b.wide": RNG.normal(size=(5, 7)).astype(np.float32),
    "a.half": RNG.normal(size=(6, 4)).astype(released.TYPES["BF16"]),
    "c.codes": RNG.normal(size=(3, 2)).astype(released.TYPES["F8_E4M3"]),
    "c.powers": np.exp2(RNG.integers(-5, 5, (2, 2))).astype(released.TYPES["F8_E8M0"]),
    "stack": RNG.normal(size=(2, 3, 4)).astype(np.float32),
    "vector": np.arange(9, dtype=np.int32),
}
DTYPES = {dtype: name for name, dtype in released.TYPES.items()}


def whole(stored):
    rows = int(np.prod(stored.shape[:-1])) if len(stored.shape) > 1 else stored.shape[0]
    return stored.rows(0, rows).reshape(stored.shape)


def same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == want.tobytes()


def test_reads_what_the_package_writes(tmp_path):
    released.write_file(tmp_path / "x", TENSORS)
    found = read_header(tmp_path / "x")
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert DTYPES[value.dtype] == found[name].dtype
        same(whole(found[name]), value)
    same(found["b.wide"].rows(2, 4), TENSORS["b.wide"][2:4])
    same(found["stack"].rows(2, 5), TENSORS["stack"].reshape(6, 4)[2:5])
    same(found["vector"].rows(3, 9), TENSORS["vector"][3:9])


def test_writes_the_package_s_very_bytes(tmp_path):
    released.write_file(tmp_path / "package", TENSORS)
    plans = {n: Plan(DTYPES[v.dtype], v.shape) for n, v in TENSORS.items()}
    with TensorFile(tmp_path / "ours", plans) as file:
        for name in reversed(TENSORS):
            value = TENSORS[name]
            rows = value.reshape(-1, *value.shape[-1:]) if value.ndim > 1 else value
            middle = len(rows) // 2
            file.write(name, middle, rows[middle:])
            file.write(name, 0, rows[:middle])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "package").read_bytes()


def test_a_file_that_was_not_filled_is_noticed(tmp_path):
    with (
        pytest.raises(AssertionError, match="20 bytes not written"),
        TensorFile(tmp_path / "x", {"a": Plan("F32", (5,))}),
    ):
        pass


def cut(raw):
    return raw[:-10]


def lengthen(raw):
    return raw + bytes(4)


def header(change):
    def damage(raw):
        length = int.from_bytes(raw[:8], "little")
        about = json.loads(raw[8 : 8 + length])
        change(about)
        text = json.dumps(about).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"has \d+ bytes instead of the \d+ .*is cut off"),
        (lengthen, r"has \d+ bytes instead of the \d+"),
        (lambda raw: raw[:5], "cut off or no safetensors file"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1", "no safetensors"),
        (lambda raw: raw[:8] + b"x" + raw[9:], "bad header"),
        (lambda raw: (2).to_bytes(8, "little") + b"[]", "bad header"),
        (header(lambda a: a["b.wide"].pop("shape")), "entry of b.wide is damaged"),
        (header(lambda a: a["b.wide"].update(shape="57")), "b.wide is damaged"),
        (header(lambda a: a["b.wide"].update(shape=[5, 7.0])), "b.wide is damaged"),
        (header(lambda a: a["b.wide"].update(data_offsets=[0])), "b.wide is damaged"),
        (header(lambda a: a.update({"b.wide": 5})), "entry of b.wide is damaged"),
        (header(lambda a: a["b.wide"].update(dtype=["F32"])), r"has dtype \['F32'\]"),
        (
            header(lambda a: a["stack"].update(data_offsets=[0, 96])),
            r"b.wide begins at byte \d+ instead of \d+: tensors must neither overlap",
        ),
        (
            header(lambda a: a["b.wide"].update(data_offsets=[4, 144])),
            r"b.wide begins at byte \d+ instead of \d+: .* leave gaps",
        ),
        (header(lambda a: a["b.wide"].update(dtype="X9")), "b.wide has dtype X9"),
        (header(lambda a: a["b.wide"].update(shape=[5, 8])), "b.wide has 140 bytes"),
        (
            header(lambda a: a["b.wide"].update(data_offsets=[-4, 136])),
            "b.wide has 140 bytes",
        ),
    ],
)
def test_damage_names_the_file_and_the_tensor(tmp_path, damage, message):
    released.write_file(tmp_path / "x.safetensors", TENSORS)
    raw = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(damage(raw))
    with pytest.raises(ValueError, match=rf"x\.safetensors.*{message}"):
        read_header(tmp_path / "x.safetensors")


def test_a_file_that_shrank_after_it_was_opened(tmp_path):
    released.write_file(tmp_path / "x", TENSORS)
    stored = read_header(tmp_path / "x")["vector"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-500])
    with pytest.raises(ValueError, match="ends in the middle of vector"):
        whole(stored)
