"""Parity with transformers, live: fresh models, and exports that must load there.

  .venv/bin/python -m tests.parity.live [--seed N] [--keep FOLDER]

which is `make parity`. With the environment of tools/peers.sh it makes the models of
make_fixtures.py with a fresh seed, runs test_parity.py on them, exports each one in
every form and has transformers compute the logits of what it loads.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import deepseek_jax
from deepseek_jax.checkpoint import folders
from deepseek_jax.convert.hf_export import export_hf
from deepseek_jax.convert.hf_import import import_hf
from deepseek_jax.eval import logits

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".cache" / "peers" / "bin" / "python"
MAKER = Path(__file__).with_name("make_fixtures.py")
BOUND = 2e-5
# Form of an export: its options. transformers loads each of them, FP8 too; v3_blocks
# has several whole blocks a matrix, which is what it can read (5.23 misreads blocks at
# a ragged edge: it divides rows by blocks).
FORMS = {
    "f32": {"dtype": "f32"},
    "stacked": {"dtype": "f32", "stacked": True},
    "bf16": {"dtype": "bf16"},
    "sharded": {"dtype": "f32", "shard": 60_000},
    "fp8": {"dtype": "fp8"},
    "ue8m0": {"dtype": "fp8", "ue8m0": True},
}
ROUNDED = ("bf16", "fp8", "ue8m0")
NO_MTP = ("fp8",)  # its class for MTP rounds FP8's scales to bfloat16


def peer(*arguments: object) -> str:
    """Runs make_fixtures.py in its environment; its output."""
    run = subprocess.run(
        [PEER, MAKER, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if run.returncode:
        sys.exit(run.stderr)
    return run.stdout


def export(source: Path, target: Path, form: str) -> None:
    """Exports one form, with the logits that we give to what is exported."""
    workdir = target.with_name(f"{target.name}-ours")
    import_hf(source, workdir, say=lambda text: None)
    if form == "sharded":  # no imported layout to be kept
        shutil.rmtree(workdir / "checkpoints" / "0" / "source")
        folders.write_digests(workdir / "checkpoints" / "0")
    export_hf(workdir, target, **FORMS[form])
    again = target.with_name(f"{target.name}-again")
    import_hf(target, again, say=lambda text: None)
    config, params, balance, _ = deepseek_jax.load(again)
    expected = dict(np.load(source / "expected.npz"))
    main, mtp = logits.compute(
        logits.build(config),
        params,
        balance,
        expected["tokens"],
        mtp=config.model.mtp.depth > 0,
    )
    if form not in ROUNDED:
        assert np.abs(main - expected["logits"]).max() <= BOUND
    found = {"tokens": expected["tokens"], "logits": main}
    if "mtp_logits" in expected and form not in NO_MTP:
        found["mtp_logits"] = mtp
    np.savez_compressed(target / "expected.npz", **found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    options.add_argument("--keep", type=Path, help="a new folder for the models")
    given = options.parse_args()
    subprocess.run(["sh", ROOT / "tools" / "peers.sh"], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = given.keep or Path(scratch)
        print(f"seed {given.seed}: models by transformers", flush=True)
        print(peer("make", root / "models", given.seed))
        tests = [sys.executable, "-m", "pytest", "-q", "tests/parity"]
        env = os.environ | {"PARITY": str(root / "models")}
        subprocess.run(tests, cwd=ROOT, env=env, check=True)
        targets = []
        for source in sorted((root / "models").iterdir()):
            for form in FORMS:
                targets.append(root / "exports" / f"{source.name}-{form}")
                export(source, targets[-1], form)
        print("largest difference of logits, exported and loaded by transformers:")
        worst = 0.0
        for line in peer("check", *targets).splitlines():
            folder, error = line.split("\t")
            print(f"  {Path(folder).name:24} {error}")
            worst = max(worst, float(error))
    if not worst <= BOUND:
        sys.exit(f"{worst:.1e} is above {BOUND:.0e}")
    print(f"all within {BOUND:.0e}")


if __name__ == "__main__":
    main()
