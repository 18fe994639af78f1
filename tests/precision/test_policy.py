"""The table of policies, what config may change of them, and what it may not."""

import dataclasses

import pytest

from deepseek_jax.config import Config, RuntimeConfig, from_dict
from deepseek_jax.precision import policy
from deepseek_jax.precision.accumulate import Accumulator, by_tiles
from deepseek_jax.precision.fp8_dots import Recipe
from deepseek_jax.precision.policy import MAPS, POLICIES, V3, Pieces
from deepseek_jax.precision.quantize import Scheme
from deepseek_jax.precision.recipe import recipe
from pallas_kernels.fp8_quantize import reference as fp8

IN_FP8 = [name for name, pieces in POLICIES.items() if pieces]


@pytest.mark.parametrize("name", IN_FP8)
def test_a_policy_names_every_piece(name):
    default = Pieces()
    for field in dataclasses.fields(Pieces):
        value = getattr(POLICIES[name], field.name)
        assert value != getattr(default, field.name)
    assert from_dict(Config, {"runtime": {"compute": name}}).runtime.compute == name


def test_formats_are_those_that_there_are():
    assert set(policy.FORMATS) == set(fp8.FORMATS)


def test_v3_is_the_report_and_hopper_its_hardware():
    assert recipe(V3, "q_a") == Recipe()
    hopper = recipe(POLICIES["fp8_v3_hopper"], "experts")
    assert hopper == Recipe(product=Accumulator(14, 128))


def test_the_output_projection_reads_powers_of_two_and_keeps_nothing_more():
    own = recipe(V3, "o")
    assert own.x == Scheme(block=(1, 128), power_of_two=True)
    assert own.x_t == Scheme(block=(128, 1), power_of_two=True)
    assert own.kept is None


@pytest.mark.parametrize("name", [None, "", "combine", "head", "router"])
def test_what_stays_in_higher_precision(name):
    assert recipe(V3, name) is None


def test_a_deviation_changes_its_piece_alone():
    default = Recipe()
    per_tensor = recipe(POLICIES["fp8_per_tensor"], "up")
    assert {s.block for s in (per_tensor.x, per_tensor.w, per_tensor.g_t)} == {None}
    assert per_tensor.product is by_tiles
    for name, fields in (
        ("fp8_e5m2_grads", {"g": ("e5m2", (1, 128)), "g_t": ("e5m2", (128, 1))}),
        ("fp8_block_grads", {"g": ("e4m3", (128, 128))}),
    ):
        own = recipe(POLICIES[name], "up")
        for field in dataclasses.fields(Recipe):
            value = getattr(own, field.name)
            if field.name in fields:
                assert (value.form, value.block) == fields[field.name]
            else:
                assert value == getattr(default, field.name)
    own = recipe(POLICIES["fp8_no_promotion"], "up")
    assert own == dataclasses.replace(default, product=Accumulator(14, None))


def test_config_changes_pieces_of_a_policy():
    own = Pieces(tile=64, bits=13, promote=64, maps="o,down", products="wgrad")
    changed = policy.pieces("fp8_v3", own)
    assert changed == dataclasses.replace(
        V3, tile=64, bits=13, promote=64, maps="o,down", products="wgrad"
    )
    made = recipe(changed, "down")
    assert (made.x.block, made.x_t.block, made.w.block) == (
        (1, 64),
        (64, 1),
        (128,) * 2,
    )
    assert made.product == Accumulator(13, 64) and made.products == ("wgrad",)
    assert recipe(changed, "q_a") is None


@pytest.mark.parametrize(
    ("piece", "value", "right"),
    [
        ("forward", "e4m2", "must be one of e4m3, e5m2, e5m6"),
        ("gradients", "bf16", "must be one of"),
        ("tile", -2, "must be 0 (all) or more"),
        ("block", -7, "must be 0 (all) or more"),
        ("rows", 0, "must be 1 or more"),
        ("promote", 48, "must be a multiple of 32"),
        ("promote", -32, "must be a multiple of 32"),
        ("bits", 25, "must be from 2 to 24"),
        ("bits", 1, "must be from 2 to 24"),
        ("powers", "true", "must be one of yes, no"),
        ("exact", "1", "must be one of yes, no"),
        ("swiglu", "maybe", "must be one of yes, no"),
        ("kept", "e4m3", "must be one of fp8, bf16"),
        ("out", "fp8", "must be one of e4m3, e5m2, e5m6, bf16"),
        ("products", "fprop,dgard", "did you mean 'dgrad'?"),
        ("maps", "q_a,expert", "did you mean 'experts'?"),
        *(("maps", name, f"{name} must stay above 8 bits") for name in policy.HIGHER),
    ],
)
def test_pieces_that_cannot_be_are_refused(piece, value, right):
    with pytest.raises(ValueError) as refusal:
        from_dict(Config, {"runtime": {"compute": "fp8_v3", "fp8": {piece: value}}})
    message = str(refusal.value)
    assert message.startswith(f"runtime.fp8.{piece} = {value!r}: ")
    assert right in message


def test_the_exact_model_has_fewer_bits():
    with pytest.raises(ValueError, match="must be from 2 to 18"):
        Pieces(exact="yes", bits=20)
    with pytest.raises(ValueError, match=r"runtime.fp8.bits = 0: needs bits"):
        policy.pieces("fp8_v3", Pieces(exact="yes"))


def test_pieces_need_a_policy_that_has_them():
    with pytest.raises(ValueError, match="compute is 'bf16'"):
        RuntimeConfig(compute="bf16", fp8=Pieces(tile=64))
    with pytest.raises(ValueError, match="must be one of f32, bf16, fp8_v3, "):
        RuntimeConfig(compute="fp8")


def test_maps_that_stay_above_and_maps_in_fp8_have_no_name_in_common():
    assert not {*MAPS} & {*policy.HIGHER}
