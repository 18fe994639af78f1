"""Everything that only a Hopper GPU can show, by one command in under eight minutes.

    make gpu-wheels     beforehand, on a machine with a network: see `gpu_wheels`
    make bench-gpu      on the GPU machine; needs Python >= 3.12 with JAX for CUDA

Parts run one after another, each as a command of its own with a budget of seconds; one
that takes longer is cut, and the summary says so. They are the kernels' tests, run by
the GPU instead of the simulator; the benchmark of kernels; which accumulator the FP8
product has; and 200 steps of `mini` with our kernels and without, compared with a CPU's
losses. What the machine lacks is installed from the wheels, beside what it has.

--out gets summary.json, a file of each part that measures, and output.log. Kept between
calls, in runs/gpu: what was installed, the text, the runs. --device=cpu goes through
the same at tiny sizes: it checks this command, nothing else.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_wheels import DATA, WHEELS
from deepseek_jax.files import write_text

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs/gpu"
RESULTS = ROOT / "experiments/results/kernels"
REFERENCE = "experiments/results/kernels/mini_cpu.json"
TOTAL = 480  # seconds, of all parts and what comes before them
GRACE = 5  # seconds that a part that is cut has for stopping by itself
SAID, WIDE = 4, 160  # lines of a part's output in the summary, and their characters
KEPT = 200_000  # characters of it in the log
PATHS = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)+")  # folders, which differ by machine

# Asks JAX for its device, and the kernels whether that is one of theirs.
PROBE = """
import json, jax
from pallas_kernels.choice import require_hopper
found = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "refusal": ""}
try:
    require_hopper()
except NotImplementedError as error:
    found["refusal"] = str(error)
print(json.dumps(found))
"""


class Part(NamedTuple):
    """A command for Python, {names} of folders in it, and the seconds it may take."""

    name: str
    seconds: int
    command: str


MINI = """-m experiments.train --config=experiments/configs/mini.py
 --config.train.steps=200 --config.optim.horizon=300 --config.runtime.compute=bf16
 --config.train.eval_every=200 --config.train.checkpoint_every=200
 --config.data.source={data}/corpus --config.data.tokenizer={data}/tokenizer"""
TINY = """-m experiments.train --config=experiments/configs/tiny.py:smoke
 --config.model.num_layers=2 --config.model.mtp.depth=0
 --config.train.steps=3 --config.data.batch=2 --config.data.length=32
 --config.data.tokenizer=bytes --config.data.source={data}/text.jsonl"""
RUNS = "--config.runtime.implementation=auto --workdir={runs}/kernels"
RUNS_XLA = "--config.runtime.implementation=xla --workdir={runs}/xla"
COMPARE = "-m benchmarks.gpu_training {runs}/kernels {runs}/xla --json {out}/mini.json"

# By --device. The environment of all parts, then the parts.
ENVIRONMENT = {
    "hopper": {
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # tests share the GPU
        "XLA_FLAGS": "",  # those of the tests are for a CPU
    },
    "cpu": {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": ".cache/jax-tests",
    },
}
PARTS = {
    "hopper": (
        Part("fp8", 25, "-m benchmarks.fp8_hardware --json {out}/fp8_accumulator.json"),
        Part(
            "tests",
            110,
            "-m pytest -q -n 4 -W default -rfEs -p no:cacheprovider"
            " --ignore-glob=*test_aot* tests/pallas_kernels",
        ),
        Part("kernels", 75, f"{MINI} {RUNS}"),
        Part("xla", 75, f"{MINI} {RUNS_XLA}"),
        Part("bench", 140, "-m pallas_kernels.bench --sizes v3 replica --out {out}"),
        Part("compare", 15, f"{COMPARE} --reference {REFERENCE} --bench {{out}}"),
    ),
    "cpu": (
        Part(
            "fp8",
            60,
            "-m benchmarks.fp8_hardware --side 64 --lengths 128"
            " --json {out}/fp8_accumulator.json",
        ),
        Part(
            "tests",
            60,
            "-m pytest -q -p no:cacheprovider -k report_is_read"
            " tests/pallas_kernels/test_testing.py",
        ),
        Part("kernels", 120, f"{TINY} {RUNS}"),
        Part("xla", 120, f"{TINY} {RUNS_XLA}"),
        Part(
            "bench",
            60,
            "-m pallas_kernels.bench --sizes ci --ops fp8_quantize --out {out}",
        ),
        Part("compare", 60, f"{COMPARE} --bench {{out}}"),
    ),
}


class Refused(Exception):
    """This machine cannot run it; the text says what to do."""


def probe(device: str) -> dict[str, str]:
    """The device's name and JAX's version.

    Raises:
      Refused: there is no JAX, or no GPU of the kind that is asked for.
    """
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})
    found = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise Refused(
            f"JAX does not start with {Path(sys.executable).name}: {last}; it takes "
            "python3, or another: make bench-gpu PYTHON=.venv/bin/python"
        )
    answer: dict[str, str] = json.loads(found.stdout.splitlines()[-1])
    if device == "hopper" and answer["refusal"]:
        raise Refused(
            f"{answer['refusal']}; --device=cpu runs all parts at tiny sizes, which "
            "checks the command alone"
        )
    return answer


def lacking(wheels: list[Path]) -> list[Path]:
    """Wheels of packages that Python does not have, or has older."""

    def old(wheel: Path) -> bool:
        name, version = wheel.name.split("-")[:2]
        try:
            return ordered(importlib.metadata.version(name)) < ordered(version)
        except importlib.metadata.PackageNotFoundError:
            return True

    return [wheel for wheel in wheels if old(wheel)]


def ordered(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def prepare(wheels: Path) -> None:
    """Installs into runs/gpu/site what is lacking, and unpacks the text.

    Raises:
      Refused: the wheels' folder is not there, or pip fails.
    """
    if not (wheels / DATA).is_file():
        raise Refused(
            f"{wheels} holds no {DATA}: run `make gpu-wheels` where there is a network,"
            " and bring the folder along"
        )
    for name in ("site", "data"):
        shutil.rmtree(WORK / name, ignore_errors=True)
    with tarfile.open(wheels / DATA) as archive:
        archive.extractall(WORK / "data", filter="data")
    if missing := lacking(sorted(wheels.glob("*.whl"))):
        names = ", ".join("-".join(wheel.name.split("-")[:2]) for wheel in missing)
        print(f"installing {names}", flush=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
        install += ["--no-deps", "--no-compile", "--target", WORK / "site", *missing]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"pip: {done.stderr.strip().splitlines()[-1]}")


def prepare_tiny() -> None:
    """The paragraphs of the README, as text to train on."""
    texts = (ROOT / "README.md").read_text().split("\n\n")
    lines = [json.dumps({"text": text}) for text in texts]
    write_text(WORK / "data/text.jsonl", "\n".join(lines) + "\n")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and all that it started, gently first."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def seconds_left(part: Part, begun: float) -> float:
    """A part's budget, or less where it would end after TOTAL seconds in all."""
    spent = time.monotonic() - begun
    return max(min(part.seconds, TOTAL - spent - 2 * GRACE), 0)


def run(
    part: Part,
    seconds: float,
    folders: Mapping[str, Path],
    environment: Mapping[str, str],
) -> tuple[dict[str, Any], str]:
    """Runs a part for at most `seconds`: its row of the summary, and its output.

    `state` is "ok", "failed" or "cut".
    """
    words = shlex.split(part.command.format(**folders))
    log = folders["runs"] / f"{part.name}.txt"
    begun = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "failed" if process.wait(seconds) else "ok"
        except subprocess.TimeoutExpired:
            state = "cut"
        finally:
            stop(process)
    output = log.read_text(errors="replace")
    said = PATHS.sub("", output.rstrip())
    row = {
        "part": part.name,
        "state": state,
        "seconds": round(time.monotonic() - begun, 1),
        "budget": round(seconds, 1),
        "command": " ".join(["python", *part.command.split()]),
        "says": [line[:WIDE] for line in said.splitlines()[-SAID:]],
    }
    return row, output[-KEPT:]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS["hopper"]]
    add = parser.add_argument
    add("--device", choices=list(PARTS), default="hopper", help="hopper, or cpu: tiny")
    add("--parts", nargs="+", choices=names, default=names, help="all of them")
    add("--out", type=Path, help="experiments/results/kernels/DEVICE")
    add("--wheels", type=Path, default=ROOT / WHEELS, help=f"{WHEELS}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    begun = time.monotonic()
    try:
        found = probe(args.device)
        prepare(args.wheels) if args.device == "hopper" else prepare_tiny()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    named = re.sub(r"[^A-Za-z0-9]+", "_", found["device"])
    out = (args.out or RESULTS / named).resolve()
    folders = {"out": out, "runs": WORK / "runs", "data": WORK / "data"}
    shutil.rmtree(folders["runs"], ignore_errors=True)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    paths = [str(WORK / "site"), os.environ.get("PYTHONPATH", "")]
    environment = ENVIRONMENT[args.device] | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "DEEPSEEK_JAX_CACHE": str(folders["data"] / "cache"),
    }
    rows, outputs = [], []
    for part in PARTS[args.device]:
        if part.name not in args.parts:
            continue
        row, output = run(part, seconds_left(part, begun), folders, environment)
        rows.append(row)
        outputs.append(f"== {part.name}\n{output}\n")
        print(
            f"{row['state']:7}{row['seconds']:6.1f} s of {row['budget']}  {part.name}"
        )
        for line in row["says"]:
            print(f"       {line}")
        summary = {k: found[k] for k in ("device", "jax")}
        summary |= {"seconds": round(time.monotonic() - begun, 1), "parts": rows}
        write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_text(out / "output.log", "".join(outputs))
    print(f"wrote {out}")
    return int(any(row["state"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
