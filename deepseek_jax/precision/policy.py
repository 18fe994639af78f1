"""Which numbers of training are rounded to what: named policies as a table of pieces.

`fp8_v3` is section 3.3 of arXiv:2412.19437 with exact sums; `fp8_v3_hopper` adds the
short accumulator of the hardware and its promotion. The others change one piece, to see
what it is worth: the report argues for tiles against one scale for a matrix, for scales
of the moment against those of earlier steps (`delayed`), for E4M3 against E5M2
gradients, for promotion, and found that blocks of gradients diverge. Only data here;
`precision.recipe` makes functions of it.
"""

import dataclasses
import difflib
from dataclasses import dataclass

from deepseek_jax.nested import check

FORMATS = ("e4m3", "e5m2", "e5m6")
PRODUCTS = ("fprop", "dgrad", "wgrad")
# Linear maps by their names in the model; "experts" are the routed ones' three.
ATTENTION_MAPS = ("q_a", "q_b", "kv_a", "kv_b", "q", "k", "v", "o")
MAPS = (*ATTENTION_MAPS, "gate", "up", "down", "experts")
# Never below bfloat16: section 3.3.1, and `combine` (of an MTP module) as released.
HIGHER = ("embed", "head", "router", "norm", "core", "combine")


@dataclass(frozen=True)
class Pieces:
    """What FP8 training is made of; "" and -1 stand for what the named policy has."""

    forward: str = ""  # format of activations and weights
    gradients: str = ""  # format of gradients
    tile: int = -1  # numbers of K in an activation or gradient with one scale; 0: all
    block: int = -1  # side of a weight's blocks with one scale; 0: the whole matrix
    rows: int = -1  # of a gradient that share a scale too, in Dgrad
    powers: str = ""  # scales are powers of two: "yes" or "no"
    bits: int = -1  # significant ones of a sum; 0: all of float32's
    promote: int = -1  # N_C, numbers of K summed so; 0: all
    exact: str = ""  # cuts off each product ("yes"), or sums of 32: `accumulate`
    products: str = ""  # those in FP8, as in "fprop,dgrad,wgrad"; others in bfloat16
    maps: str = ""  # those in FP8, as in "q_a,o,experts"; others in bfloat16
    kept: str = ""  # what backward reads a map's input as: "fp8" or "bf16"
    swiglu: str = ""  # keeps SwiGLU's inputs and not its output: "yes" or "no"
    out: str = ""  # what attention's output is kept as: a format, or "bf16"
    history: int = -1  # steps whose largest magnitudes give scales; 0: the moment's

    def __post_init__(self) -> None:
        for name in ("forward", "gradients"):
            self._one_of(name, *FORMATS)
        for name in ("powers", "exact", "swiglu"):
            self._one_of(name, "yes", "no")
        self._one_of("kept", "fp8", "bf16")
        self._one_of("out", *FORMATS, "bf16")
        for name in ("tile", "block"):
            self._check(name, getattr(self, name) >= -1, "must be 0 (all) or more")
        self._check("history", self.history >= -1, "must be 0 (none) or more steps")
        self._check("rows", self.rows == -1 or self.rows >= 1, "must be 1 or more")
        self._check(
            "promote",
            self.promote == -1 or (self.promote >= 0 and self.promote % 32 == 0),
            "must be a multiple of 32, or 0 (all of K)",
        )
        most = 18 if self.exact == "yes" else 24
        self._check(
            "bits",
            self.bits in (-1, 0) or 2 <= self.bits <= most,
            f"must be from 2 to {most}, or 0 (float32)",
        )
        self._names("products", PRODUCTS)
        for name in self.maps.split(","):
            self._check("maps", name not in HIGHER, f"{name} must stay above 8 bits")
        self._names("maps", MAPS)

    def _check(self, name: str, ok: bool, right: str) -> None:
        check(ok, f"runtime.fp8.{name}", getattr(self, name), right)

    def _one_of(self, name: str, *allowed: str) -> None:
        value = getattr(self, name)
        self._check(
            name, value in ("", *allowed), f"must be one of {', '.join(allowed)}"
        )

    def _names(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        wrong = [each for each in value.split(",") if each not in allowed]
        near = difflib.get_close_matches(wrong[0], allowed, 1) if wrong else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        self._check(
            name, not value or not wrong, f"must be some of {','.join(allowed)}{hint}"
        )


AS_NAMED = Pieces()
V3 = Pieces(
    forward="e4m3",
    gradients="e4m3",
    tile=128,
    block=128,
    rows=1,
    powers="no",
    bits=0,
    promote=0,
    exact="no",
    products=",".join(PRODUCTS),
    maps=",".join(MAPS),
    kept="fp8",
    swiglu="yes",
    out="e5m6",
    history=0,
)
PER_TENSOR = dataclasses.replace(V3, tile=0, block=0)

# None: nothing is in FP8, and products are of the type in the name.
POLICIES: dict[str, Pieces | None] = {
    "f32": None,
    "bf16": None,
    "fp8_v3": V3,
    "fp8_v3_hopper": dataclasses.replace(V3, bits=14, promote=128),
    "fp8_per_tensor": PER_TENSOR,
    "fp8_delayed": dataclasses.replace(PER_TENSOR, history=16),
    "fp8_e5m2_grads": dataclasses.replace(V3, gradients="e5m2"),
    # By the cheap model, which overstates what is lost: `accumulate`.
    "fp8_no_promotion": dataclasses.replace(V3, bits=14, promote=0),
    "fp8_block_grads": dataclasses.replace(V3, rows=128),
}


def pieces(compute: str, own: Pieces = AS_NAMED) -> Pieces | None:
    """A policy's pieces, those that `own` names changed; None: it has no FP8.

    Raises:
      ValueError: no such policy; or pieces of FP8 for one that has none.
    """
    near = difflib.get_close_matches(str(compute), POLICIES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    names = ", ".join(POLICIES)
    right = f"must be one of {names}{hint}"
    check(compute in POLICIES, "runtime.compute", compute, right)
    named = POLICIES[compute]
    changed = {
        field.name: value
        for field in dataclasses.fields(own)
        if (value := getattr(own, field.name)) != field.default
    }
    for name, value in changed.items():
        check(
            named is not None,
            f"runtime.fp8.{name}",
            value,
            f"needs a policy with FP8, runtime.compute is {compute!r}",
        )
    if named is None:
        return None
    made = dataclasses.replace(named, **changed)
    bits, exact = made.bits, made.exact == "yes"
    fits = bool(bits) or not exact
    check(fits, "runtime.fp8.bits", bits, "needs bits, exact is 'yes'")
    right = (
        f"must be 0, one scale a matrix, with a history of {made.history} steps "
        f"(runtime.compute = {compute!r}); or set runtime.fp8.history = 0"
    )
    for name in ("tile", "block"):
        side = getattr(made, name)
        check(not (side and made.history), f"runtime.fp8.{name}", side, right)
    return made


def check_alone(compute: str, own: Pieces, devices: int, schedule: str) -> None:
    """Refuses scales of earlier steps where their histories are not kept.

    Raises:
      ValueError: on a mesh of several devices, or under a pipeline's schedule.
    """
    found = pieces(compute, own)
    if not found or not found.history:
        return
    right = (
        f"with runtime.compute = {compute!r} and a history of {found.history} steps; "
        "take fp8_per_tensor, or runtime.fp8.history = 0"
    )
    check(devices == 1, "mesh.size", devices, f"must be 1 {right}")
    check(schedule == "none", "pipeline.schedule", schedule, f"must be 'none' {right}")
