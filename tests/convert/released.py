"""Checkpoints in the released form, made without the library: for tests of it."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from tests.pallas_kernels.fp8_oracle import quantized

FIXTURES = Path(__file__).resolve().parent.parent / "parity" / "fixtures"
TYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I32": np.dtype(np.int32),
}
# README_WEIGHTS.md: what a release does not quantise.
WIDE = ("embed_tokens", "head", "norm", "mlp.gate.", "eh_proj")


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, by the safetensors package."""
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in read_file(file).items()
    }


def read_file(file: Path) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(raw["data"], TYPES[raw["dtype"]]).reshape(raw["shape"])
        for name, raw in safetensors.deserialize(file.read_bytes())
    }


def write_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    alive = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=value.dtype.name,
            shape=tensors[name].shape,
            data_ptr=value.ctypes.data,
            data_len=value.nbytes,
        )
        for name, value in alive.items()
    }
    safetensors.serialize_file(specs, file, metadata={"format": "pt"})


def write(
    folder: Path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """A checkpoint folder; with several shards, names are dealt out in turn."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n"
    )
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    places = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(places.values()):
        inside = {n: v for n, v in tensors.items() if places[n] == file}
        write_file(folder / file, inside)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n"
    )
    return folder


def fixture(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and tensors of a parity fixture."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    return config, read(FIXTURES / name)


def to_fp8(
    config: dict,
    tensors: dict[str, np.ndarray],
    block: tuple[int, int] = (16, 16),
    power_of_two: bool = False,
    scale_dtype: str = "F32",
) -> tuple[dict, dict[str, np.ndarray]]:
    """The same checkpoint as a release would quantise it; the rest in bfloat16."""
    found = {}
    for name, value in tensors.items():
        if any(part in name for part in WIDE):
            wide = name.endswith("bias")
            found[name] = value.astype(TYPES["F32" if wide else "BF16"])
            continue
        codes, scale = quantized(value.astype(np.float32), block, power_of_two)
        found[name] = codes.view(TYPES["F8_E4M3"])
        found[f"{name}_scale_inv"] = scale.astype(TYPES[scale_dtype])
    about = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    about |= {"scale_fmt": "ue8m0"} if power_of_two else {}
    return config | {"quantization_config": about, "dtype": "bfloat16"}, found


def from_fp8(tensors: dict[str, np.ndarray], block: tuple[int, int]) -> dict:
    """What DeepSeek's fp8_cast_bf16.py makes of the tensors."""
    found = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if value.dtype == TYPES["F8_E4M3"]:
            scale = tensors[f"{name}_scale_inv"].astype(np.float32)
            wide = np.kron(scale, np.ones(block, np.float32))
            wide = wide[: value.shape[0], : value.shape[1]]
            value = (value.astype(np.float32) * wide).astype(TYPES["BF16"])
        found[name] = value
    return found


def copied(name: str, target: Path) -> Path:
    """A copy of a fixture's files, to be damaged."""
    shutil.copytree(FIXTURES / name, target)
    (target / "expected.npz").unlink()
    return target
