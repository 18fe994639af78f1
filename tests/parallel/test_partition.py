"""Rules to shardings: the tables against a whole `TrainState`, and what is refused."""

import functools

import jax
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import RULES, MeshConfig
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import partition, rules
from deepseek_jax.parallel.rules import Place, Rule, Split
from deepseek_jax.train.state import assemble, init_state
from tests.parallel.test_training import config_of

MESH = MeshConfig(data=2, fsdp=2, expert=2)


@functools.cache
def state():
    parts = assemble(config_of(MeshConfig()))
    return jax.eval_shape(functools.partial(init_state, parts), 0)


def placed(config: MeshConfig) -> dict[str, P]:
    sharding = partition.shardings(config, meshes.make(config), state())
    return {name: each.spec for name, each in partition.named(sharding).items()}


def with_rules(name: str, *own: tuple[str, str]) -> MeshConfig:
    return MeshConfig(data=2, fsdp=2, expert=2, rules=name, own_rules=own)


def test_every_preset_places_every_array():
    assert set(rules.PRESETS) == {*RULES, "decode"}
    for name in RULES:
        assert placed(with_rules(name)).keys() == partition.named(state()).keys()


def test_every_built_in_rule_decides_something():
    for preset in rules.PRESETS.values():
        names = partition.named(state())
        used = {id(partition.deciding(preset, name)) for name in names}
        assert used == {id(rule) for rule in preset}


EXPERT, EMBED = "params/moe/moe/gate", "params/embed"
MOMENT = "opt_state/1/0/mu/moe/attn/q_b/kernel"
WHERE = {
    ("fsdp", EXPERT): P(None, ("node", "expert"), None, ("pipe", "fsdp")),
    ("fsdp", MOMENT): P(None, None, ("pipe", "fsdp")),
    ("fsdp", "balance/0"): P(),
    ("zero1", EXPERT): P(None, ("node", "expert"), None, None),
    ("zero1", MOMENT): P(None, ("pipe", "data", "fsdp", "node", "expert"), None),
    ("zero1", "params/moe/attn/q_b/kernel"): P(),
    ("ep", EXPERT): P(None, ("node", "expert"), None, None),
    ("ep", MOMENT): P(),
    ("replicated", EXPERT): P(),
    ("replicated", EMBED): P(),
}


@pytest.mark.parametrize(("preset", "name"), WHERE)
def test_where_arrays_lie(preset, name):
    spec = placed(with_rules(preset))[name]
    assert tuple(filter(None, spec)) == tuple(filter(None, WHERE[preset, name]))
    if any(WHERE[preset, name]):
        assert spec == WHERE[preset, name]


def test_the_first_rule_that_fits_decides():
    table = (Rule("gate$", Place(("fsdp",))), Rule("", rules.WHOLE))
    assert partition.deciding(table, EXPERT) is table[0]
    assert partition.deciding(table[::-1], EXPERT) is table[1]
    own = with_rules("fsdp", (r"^params/embed$", "-,fsdp"))
    assert placed(own)[EMBED] == P(None, ("fsdp",))


def test_an_array_that_no_rule_fits_is_refused():
    with pytest.raises(ValueError, match=f"no partition rule matches {EMBED}"):
        partition.deciding((Rule("gate$", rules.WHOLE),), EMBED)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("embedding$", "-,fsdp"), "decides no array"),
        (("embed$", "-,fdsp"), "there is no axis 'fdsp'"),
        ((r"^params/embed$", "fsdp,-"), "dimension 61 must be a multiple of the 2"),
        ((r"^params/embed$", "-,-,fsdp"), "3 places, 2 dimensions"),
    ],
)
def test_a_wrong_rule_of_ones_own_is_refused(rule, message):
    with pytest.raises(ValueError, match="mesh") as refusal:
        placed(with_rules("fsdp", rule))
    assert message in str(refusal.value)


def test_a_rule_that_another_hides_is_refused():
    hidden = with_rules("fsdp", ("gate$", "-,-"), ("moe/gate$", "-,-"))
    with pytest.raises(ValueError, match=r"moe/gate.*decides no array"):
        placed(hidden)


def test_a_split_takes_the_larger_dimension_that_divides():
    mesh = meshes.make(MeshConfig(fsdp=8))
    split = Split(("fsdp",))
    spec = functools.partial(partition.spec, split, mesh=mesh, name="x")
    assert spec((16, 32)) == P(None, ("fsdp",))
    assert spec((32, 12)) == P(("fsdp",), None)
    assert spec((64, 9, 10)) == P(None, None, None)


def test_a_dimension_of_experts_must_divide():
    mesh = meshes.make(MeshConfig(expert=8))
    place = Place((rules.EXPERTS, None, None))
    with pytest.raises(ValueError, match="its dimension 12 must be a multiple"):
        partition.spec(place, (12, 4, 4), mesh, EXPERT)
