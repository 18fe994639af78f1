"""Where each array lies, as tables: the first rule whose pattern fits a name decides.

Names are paths in a `TrainState` such as params/moe/attn/q_b/kernel. A place gives the
mesh axes of the last dimensions, so that one rule serves a layer and a stack of them;
`Split` leaves the choice of the dimension to the array's shape.

`fsdp` shards everything (ZeRO-3), also over the ranks of a pipeline, and experts over
their axes; `zero1` shards only what AdamW keeps, over all devices, as DeepSeek-V3 does
(arXiv:2412.19437, section 3.1); `ep` shards nothing but experts; `replicated` nothing
at all. `decode` is for the weights of
`decode.spread`, whose names are such as 0/moe/gate, and no choice of a run.
"""

from typing import NamedTuple

from deepseek_jax.parallel.mesh import AXES, EXPERTS

Axes = str | tuple[str, ...] | None


class Place(NamedTuple):
    """Mesh axes of the last dimensions; None leaves a dimension whole."""

    axes: tuple[Axes, ...]


class Split(NamedTuple):
    """The larger of a matrix's dimensions that `axes` divide; if none, both whole."""

    axes: tuple[str, ...]
    before: Axes = None  # of the dimension before the matrix


class Rule(NamedTuple):
    """Arrays whose name the pattern is found in lie at `place`."""

    pattern: str
    place: Place | Split


WHOLE = Place(())
SHARES = ("pipe", "fsdp")
EXPERT = r"/moe/(gate|up|down)$"
MOMENTS = r"^opt_state/.*/(mu|nu)/"
FEW = Rule(r"(^step|^key|/count)$|^(balance|scales)\b|/(scale|router)$", WHOLE)

PRESETS: dict[str, tuple[Rule, ...]] = {
    "fsdp": (
        Rule(EXPERT, Split(SHARES, EXPERTS)),
        FEW,
        Rule(r"/(kernel|embed|head)$", Split(SHARES)),
    ),
    "zero1": (
        Rule(MOMENTS + ".*" + EXPERT, Place((EXPERTS, ("pipe", "data", "fsdp"), None))),
        Rule(EXPERT, Place((EXPERTS, None, None))),
        FEW,
        Rule(MOMENTS, Split(AXES)),
        Rule(r"^params/", WHOLE),
    ),
    "ep": (Rule(EXPERT, Place((EXPERTS, None, None))), Rule("", WHOLE)),
    "replicated": (Rule("", WHOLE),),
    "decode": (Rule(EXPERT, Place((EXPERTS, None, None))), Rule("", WHOLE)),
}

# What `Runtime.constrain` pins, by the name it is given. Rows are split over all axes.
# XLA would look tokens up in the pieces of a table that it has split.
ACTIVATIONS: dict[str, Place] = {"hidden": Place((AXES, None, None)), "embed": WHOLE}


def own(pattern: str, places: str) -> Rule:
    """A user's rule: ("embed$", "-,fsdp"), ("gate$", "node+expert,-,-")."""
    split = [place.strip() for place in places.split(",")]
    axes = tuple(None if p == "-" else tuple(p.split("+")) for p in split)
    return Rule(pattern, Place(axes))
