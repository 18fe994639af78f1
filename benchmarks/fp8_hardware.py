"""Which accumulator does an FP8 product of this machine have?

    python -m benchmarks.fp8_hardware --json FILE

`precision.accumulate` models what arXiv:2412.19437, section 3.3.2, says of Hopper. Two
kinds of evidence, both from our kernel with scales of one (--implementation chooses
what else to ask):

* crafted: one product of 2^16 and one of 2^(16 - j) besides, which survives up to some
  j; the digits that a sum keeps are one more. PROBES say where the small one stands.
  All within 128 of K, where nothing is promoted. Then 1.75 times the least product that
  survived: adding 1 of it is cutting off, 2 is rounding.
* random: distance to each model (Frobenius), and the share of numbers that are equal to
  the last bit, for normal operands and for their magnitudes.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.fp8_gemm import SIGNS, operands
from deepseek_jax.files import write_text
from deepseek_jax.precision.accumulate import MODELS, Accumulator
from pallas_kernels import choice
from pallas_kernels.fp8_matmul import api

E4M3 = jnp.float8_e4m3fn
TILE, SIDE = 128, 64  # K of a tile; rows and columns of a crafted product
LARGE = 16  # the power of two of the large product
MOST = 26  # digits asked for: more than float32 has
LENGTHS = (128, 512, 4096)

CANDIDATES = {
    **MODELS,
    "f32, promoted": Accumulator(None, TILE),
    "hopper_exact, 13 bits": Accumulator(13, TILE, exact=True),
}
Product = Callable[[Any, Any], Any]  # x [T, K], w [K, N] -> [T, N]


class Probe(NamedTuple):
    """Places along K of the large product and of the small ones, which share 2^-j."""

    large: int
    small: tuple[int, ...]
    factor: float = 1.0


PROBES = {
    "same step of 32": Probe(0, (1,)),
    "other half of the step": Probe(0, (17,)),
    "next step": Probe(0, (33,)),
    "last step": Probe(0, (127,)),
    "step before": Probe(33, (0,)),
    "negative": Probe(0, (1,), -1.0),
    "eight in one step": Probe(0, tuple(range(1, 9))),
    "eight, a step after": Probe(0, tuple(range(33, 41))),
}


def kernel(implementation: str | None) -> Product:
    """Our product as a model has it, without scales."""

    def product(x_TK: Any, w_KN: Any) -> Any:
        x, w = jnp.asarray(x_TK, E4M3), jnp.asarray(w_KN, E4M3).T
        ones = [jnp.ones((len(each), each.shape[1] // TILE)) for each in (x, w)]
        return api.fp8_matmul(x, ones[0], w, ones[1], implementation=implementation)

    return product


def crafted(probe: Probe) -> tuple[np.ndarray, np.ndarray]:
    """x and w whose result at (j, j) is 2^16 and what is left of factor 2^(16 - j)."""
    x, w = np.zeros((SIDE, TILE)), np.zeros((TILE, 2 * SIDE))
    x[:, probe.large] = w[probe.large] = 2.0 ** (LARGE // 2)
    for j in range(MOST):
        power = LARGE - j - round(np.log2(len(probe.small)))
        x[j, list(probe.small)] = probe.factor * 2.0 ** (power // 2)
        w[list(probe.small), j] = 2.0 ** (power - power // 2)
    return x.astype(E4M3), w.astype(E4M3)


def left(product: Product, probe: Probe) -> np.ndarray:
    """What the small products changed, over what they are: for each j."""
    out = np.asarray(product(*crafted(probe)), np.float64)
    j = np.arange(MOST)
    return (out[j, j] - 2.0**LARGE) / 2.0 ** (LARGE - j)


def digits(product: Product, probe: Probe) -> int:
    """Significant bits that are kept of a sum, as this probe sees it."""
    changed = left(product, probe) != 0
    return int(np.argmin(np.append(changed, False)))


def rest(product: Product, bits: int) -> float:
    """What is left of 1.75 last digits: 1 when cut off, 2 when rounded."""
    return float(left(product, Probe(0, (1,), 1.75))[bits - 1])


def ask(product: Product) -> dict[str, float]:
    """All probes of one product, and what it does beyond the last digit."""
    found: dict[str, float] = {k: digits(product, p) for k, p in PROBES.items()}
    found["1.75 last digits"] = rest(product, int(found["same step of 32"]))
    return found


def compare(product: Product, side: int, lengths: list[int], seed: int) -> list[Any]:
    """A row for each kind of operands, K and model."""
    rows = []
    for sign, apply in SIGNS.items():
        for width in lengths:
            drawn = operands(side, width, side, seed)
            x, w = (apply(each.astype(np.float32)).astype(E4M3) for each in drawn)
            got = np.asarray(product(x, w), np.float64)
            for name, model in CANDIDATES.items():
                want = np.asarray(jax.jit(model)(x, w), np.float64)
                off = np.linalg.norm(got - want) / np.linalg.norm(want)
                row = {"operands": sign, "K": width, "model": name}
                row |= {"distance": float(off), "equal": float((got == want).mean())}
                rows.append(row)
    return rows


def show(report: dict[str, Any]) -> None:
    """Prints what was found."""
    print(f"{report['device']}, {report['implementation']}")
    names = list(report["crafted"])
    print(f"{'digits kept':24}" + "".join(f"{name:>22}" for name in names))
    for probe in report["crafted"][names[0]]:
        values = [report["crafted"][name][probe] for name in names]
        print(f"{probe:24}" + "".join(f"{value:22g}" for value in values))
    for row in report["random"]:
        print(
            f"{row['operands']:9} K = {row['K']:5} from {row['model']:22}"
            f" {row['distance']:9.2e}, {row['equal']:7.2%} equal"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_hardware",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--implementation", choices=choice.IMPLEMENTATIONS, help="else the fastest")
    add("--side", type=int, default=128, help="rows and columns of random products")
    add("--lengths", type=int, nargs="+", default=LENGTHS, help="K of random products")
    add("--seed", type=int, default=0, help="of random products")
    add("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args()
    if args.side < 1 or args.side % 64:
        parser.error(f"--side={args.side}: must be a multiple of 64")
    if wrong := [width for width in args.lengths if width < 1 or width % TILE]:
        parser.error(f"--lengths={wrong[0]}: must be multiples of {TILE}")
    product = kernel(args.implementation)
    like = jnp.zeros((args.side, TILE), E4M3)
    chosen = api.choice(like, like, jnp.float32, args.implementation)
    jitted = jax.jit(product)
    models = {name: jax.jit(model) for name, model in CANDIDATES.items()}
    report = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.fp8_hardware", *sys.argv[1:]]
        ),
        "device": jax.devices()[0].device_kind,
        "implementation": chosen.implementation,
        "crafted": {"this product": ask(jitted)}
        | {name: ask(model) for name, model in models.items()},
        "random": compare(jitted, args.side, args.lengths, args.seed),
    }
    show(report)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
