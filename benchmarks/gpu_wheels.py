"""Packs what a GPU machine without a network needs for `benchmarks.gpu`.

    make gpu-wheels

Into .gpu-wheels go wheels, of the versions in constraints.txt, of packages that images
with JAX for CUDA may lack, and data.tar.xz: the builtin corpus, its tokenizer and its
tokens, as they are on this machine. The builtin corpus is made of installed packages,
so a GPU machine's own would be another text, and losses could not be compared.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS, DATA = ".gpu-wheels", "data.tar.xz"
PYTHON = "3.12"
# pip takes these literally: a wheel for an older system is not found by a newer name.
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
# What training and the tests import, and what that imports, but for JAX, NumPy and what
# comes with them.
PACKAGES = (
    "absl-py",
    "aiofiles",
    "array_record",
    "chex",
    "cloudpickle",
    "etils",
    "execnet",
    "flax",
    "grain",
    "humanize",
    "hypothesis",
    "iniconfig",
    "ml_collections",
    "msgpack",
    "optax",
    "orbax-checkpoint",
    "orjson",
    "packaging",
    "pluggy",
    "portpicker",
    "protobuf",
    "psutil",
    "pytest",
    "pytest-xdist",
    "sentencepiece",
    "simplejson",
    "sortedcontainers",
    "tensorboardX",
    "tensorstore",
    "toolz",
    "treescope",
    "zipp",
)


def pinned() -> list[str]:
    """The packages with their versions.

    Raises:
      ValueError: constraints.txt does not pin one.
    """
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {re.sub(r"[-_.]+", "-", line).partition("==")[0]: line for line in lines}
    missing = [name for name in PACKAGES if name.replace("_", "-") not in pins]
    if missing:
        raise ValueError(f"constraints.txt does not pin {', '.join(missing)}")
    return [pins[name.replace("_", "-")] for name in PACKAGES]


def download(folder: Path) -> None:
    """Fetches the wheels for Linux on x86-64, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={PYTHON}", f"--dest={folder}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, *pinned()], check=True)


def pack(archive: Path) -> None:
    """Writes corpus, tokenizer and tokens of `mini`, building them if need be."""
    from deepseek_jax import presets, tokenizer
    from deepseek_jax.config import DataConfig
    from deepseek_jax.data.sources import open_corpus
    from deepseek_jax.data.store import open_store

    data = DataConfig()
    corpus = open_corpus(data)
    trained = tokenizer.build(data.tokenizer, presets.mini().vocab_size, corpus)
    tokens = Path(open_store(corpus, trained).tokens.filename).parent
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "w:xz") as file:
        trained.save(Path(folder))
        file.add(folder, "tokenizer")
        file.add(corpus.root, "corpus")
        file.add(tokens, f"cache/tokens/{tokens.name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / WHEELS, help=WHEELS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.whl"):
        old.unlink()
    download(args.out)
    pack(args.out / DATA)
    files = [path for path in args.out.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size / 1e6:.0f} MB, in {args.out}")


if __name__ == "__main__":
    main()
