"""From rules to shardings: which devices hold which part of which array.

The engine of the tables in `rules`. Ours; the layouts are those of arXiv:2412.19437,
section 3.1.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import Config, MeshConfig
from deepseek_jax.parallel import rules as tables
from deepseek_jax.parallel.mesh import EXPERTS
from deepseek_jax.parallel.rules import Axes, Place, Rule, Split

Shape = tuple[int, ...]


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths, as params/moe/attn/q_b/kernel."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }


def rules_of(config: MeshConfig) -> tuple[Rule, ...]:
    """The user's own rules, then the preset's."""
    own = [tables.own(pattern, places) for pattern, places in config.own_rules]
    return (*own, *tables.PRESETS[config.rules])


def deciding(rules: Sequence[Rule], name: str) -> Rule:
    """The first rule that fits a name.

    Raises:
      ValueError: none does.
    """
    for rule in rules:
        if re.search(rule.pattern, name):
            return rule
    raise ValueError(f"no partition rule matches {name}; the last one may be ''")


def check_own(config: MeshConfig, mesh: Mesh, names: Iterable[str]) -> None:
    """Refuses a user's own rule that is wrong or decides nothing.

    Raises:
      ValueError: names the rule.
    """
    rules = rules_of(config)
    deciders = {id(deciding(rules, name)) for name in names}
    for pair, rule in zip(config.own_rules, rules):
        unknown = {a for axes in rule.place.axes for a in _tuple(axes)} - {
            *mesh.axis_names
        }
        if unknown:
            raise ValueError(
                f"mesh.own_rules {pair!r}: there is no axis {min(unknown)!r}; write "
                f"'-' or some of {', '.join(mesh.axis_names)}, joined by +, for each "
                "of the last dimensions"
            )
        if id(rule) not in deciders:
            raise ValueError(
                f"mesh.own_rules {pair!r}: decides no array; names are such as "
                "params/moe/attn/q_b/kernel, and the first rule that fits counts"
            )


def spec(place: Place | Split, shape: Shape, mesh: Mesh, name: str) -> PartitionSpec:
    """The place of an array of this shape.

    Raises:
      ValueError: a dimension that is not a multiple of its axes' devices, or more axes
        than dimensions.
    """
    if isinstance(place, Split):
        place = _chosen(place, shape, mesh)
    if len(place.axes) > len(shape):
        raise ValueError(
            f"mesh rule for {name}: {len(place.axes)} places, {len(shape)} dimensions"
        )
    axes = [None] * (len(shape) - len(place.axes)) + list(place.axes)
    for n, (dim, over) in enumerate(zip(shape, axes, strict=True)):
        size = math.prod(mesh.shape[axis] for axis in _tuple(over))
        if size == 1:
            axes[n] = None
        if dim % size:
            raise ValueError(
                f"mesh rule for {name}: its dimension {dim} must be a multiple of the "
                f"{size} devices of {' x '.join(_tuple(over))}"
            )
    return PartitionSpec(*axes)


def _chosen(split: Split, shape: Shape, mesh: Mesh) -> Place:
    """The place that a split comes to for this shape."""
    size = math.prod(mesh.shape[axis] for axis in split.axes)
    fitting = [n for n in (-2, -1) if len(shape) >= -n and shape[n] % size == 0]
    best = max(fitting, key=lambda n: (shape[n], n), default=None)
    matrix = [split.axes if n == best else None for n in (-2, -1)]
    return Place((split.before, *matrix)[-len(shape) :])


def _tuple(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def shardings(config: MeshConfig, mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a `TrainState`, or of its shapes.

    Raises:
      ValueError: as `check_own`, `deciding` and `spec`.
    """
    check_own(config, mesh, named(tree))
    return by_table(rules_of(config), mesh, tree)


def by_table(rules: Sequence[Rule], mesh: Mesh, tree: Any) -> Any:
    """The sharding that a table gives every leaf of a pytree.

    Raises:
      ValueError: as `deciding` and `spec`.
    """
    placed = [
        NamedSharding(mesh, spec(deciding(rules, name).place, leaf.shape, mesh, name))
        for name, leaf in named(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def expert_places(config: Config, mesh: Mesh) -> tuple[PartitionSpec, ...]:
    """Where one layer's gate, up and down lie, experts always over their axes."""
    moe, dim = config.model.moe, config.model.dim
    wide, tall = (dim, moe.ffn_dim), (moe.ffn_dim, dim)
    places = []
    for name, matrix in {"gate": wide, "up": wide, "down": tall}.items():
        path, shape = f"params/moe/moe/{name}", (moe.num_experts, *matrix)
        place = spec(deciding(rules_of(config.mesh), path).place, shape, mesh, path)
        places.append(PartitionSpec(EXPERTS, *(*place[1:], None, None)[:2]))
    return tuple(places)


def pin(x: jax.Array, name: str, *, mesh: Mesh) -> jax.Array:
    """`Runtime.constrain`: an activation lies where its table says."""
    place = spec(tables.ACTIVATIONS[name], x.shape, mesh, name)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, place))
