"""Overlap read from programs: short ones by hand, in XLA's own words."""

import numpy as np
import pytest

from deepseek_jax.analysis import hlo, hlo_text

HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n"

# A product inside a fusion inside a call: 2 * 4 * 6 * 5 operations.
NESTED = """
%fused (p0: bf16[4,6], p1: bf16[6,5]) -> f32[4,5] {
  %p0 = bf16[4,6]{1,0} parameter(0)
  %p1 = bf16[6,5]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,5]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(f)/layer/shared/dot_general"}
}

%called (c0: bf16[4,6], c1: bf16[6,5]) -> f32[4,5] {
  %c0 = bf16[4,6]{1,0} parameter(0)
  %c1 = bf16[6,5]{1,0} parameter(1)
  ROOT %gemm = f32[4,5]{1,0} fusion(%c0, %c1), kind=kCustom, calls=%fused
}

%nothing (n0: bf16[4,6], n1: bf16[6,5]) -> f32[4,5] {
  %n0 = bf16[4,6]{1,0} parameter(0)
  %n1 = bf16[6,5]{1,0} parameter(1)
  ROOT %zero = f32[4,5]{1,0} broadcast(f32[] %n0), dimensions={}
}
"""
START = (
    "  %a2a-start = ((bf16[8,4,6]{2,1,0}), bf16[8,4,6]{2,1,0}) "
    "all-to-all-start(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, "
    'dimensions={0}, metadata={op_name="jit(f)/layer/dispatch/all_to_all"}, '
    'backend_config={"collective_backend_config":{"is_sync":false}}'
)
DONE = "  %a2a-done = bf16[8,4,6]{2,1,0} all-to-all-done(%a2a-start)"
CALL = "  %call = f32[4,5]{1,0} call(%y, %w), to_apply=%called"


def program(*lines: str, before: str = NESTED) -> str:
    """An entry with these lines, after the computations that they call."""
    given = [
        "  %x = bf16[8,4,6]{2,1,0} parameter(0)",
        "  %y = bf16[4,6]{1,0} parameter(1)",
        "  %w = bf16[6,5]{1,0} parameter(2)",
        "  %flag = pred[] parameter(3)",
    ]
    head = "ENTRY %main (x: bf16[8,4,6], y: bf16[4,6]) -> bf16[8,4,6] {"
    return "\n".join((HEAD + before, head, *given, *lines, "}", ""))


def only(text: str) -> hlo.Collective:
    (found,) = hlo.collectives(text)
    return found


def test_a_product_deep_inside_a_call_hides_what_is_under_way():
    found = only(program(START, CALL, DONE))
    assert found.under == (hlo.Matmul("dot.1", "jit(f)/layer/shared/dot_general", 240),)
    assert (found.kind, found.computation, found.times) == ("all-to-all", "main", 1)
    assert found.bytes == 8 * 4 * 6 * 2
    assert found.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert found.asynchronous and not found.exposed
    assert found.within("dispatch") and not found.within("combine")
    assert found.under_scope("shared") == found.under
    assert found.under_scope("share") == ()


@pytest.mark.parametrize(
    "lines",
    [
        (CALL, START, DONE),
        (START, DONE, CALL),
        (CALL, START, "  %n = f32[4,5]{1,0} call(%y, %w), to_apply=%nothing", DONE),
        (START, "  %e = f32[8,4,6]{2,1,0} exponential(%x)", DONE, CALL),
    ],
)
def test_without_a_product_between_it_is_exposed(lines: tuple[str, ...]):
    found = only(program(*lines))
    assert found.asynchronous and found.exposed
    assert "EXPOSED" in hlo.table([found])


def test_a_done_that_is_far_away_and_another_collectives_done():
    other = START.replace("a2a-start", "late-start").replace("dispatch", "combine")
    between = [f"  %e.{i} = bf16[4,6]{{1,0}} negate(%y)" for i in range(50)]
    late = DONE.replace("a2a", "late")
    first, second = hlo.collectives(
        program(START, *between, other, DONE, CALL, *between, late)
    )
    assert first.exposed and first.within("dispatch")
    assert len(second.under) == 1 and second.within("combine")


def test_a_synchronous_collective_hides_under_nothing():
    sync = START.replace("all-to-all-start", "all-to-all").replace("a2a-start", "a2a")
    sync = sync.replace("((bf16[8,4,6]{2,1,0}), bf16[8,4,6]{2,1,0})", "bf16[8,4,6]")
    forced = START.replace('is_sync":false', 'is_sync":true')
    for lines in ((sync, CALL), (forced, CALL, DONE)):
        found = only(program(*lines))
        assert not found.asynchronous and found.exposed
        assert found.bytes == 8 * 4 * 6 * 2
        assert "SYNCHRONOUS" in hlo.table([found])


def test_a_collective_wrapped_in_a_computation_is_listed_once():
    wrapped = """
%async (a0: f32[16]) -> f32[4] {
  %a0 = f32[16]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%a0), replica_groups=[2,4]<=[8], \
dimensions={0}, to_apply=%add, metadata={op_name="jit(f)/gradient"}
}
"""
    lines = (
        "  %z = f32[16]{0} constant({...})",
        "  %start = ((f32[16]{0}), f32[4]{0}, u32[]) async-start(%z), calls=%async",
        "  %update = ((f32[16]{0}), f32[4]{0}, u32[]) async-update(%start)",
        CALL,
        "  %done = f32[4]{0} async-done(%update)",
        "  %copy-start = (f32[4]{0}, f32[4]{0}, u32[]) copy-start(%done)",
        "  %copy-done = f32[4]{0} copy-done(%copy-start)",
    )
    found = only(program(*lines, before=NESTED + wrapped))
    assert (found.kind, found.name, found.bytes) == ("reduce-scatter", "start", 64)
    assert found.op_name == "jit(f)/gradient"
    assert found.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert len(found.under) == 1


LOOP = """
%body (b0: (s32[], bf16[8,4,6], bf16[4,6], bf16[6,5])) -> (s32[], bf16[8,4,6]) {
  %b0 = (s32[], bf16[8,4,6]{2,1,0}, bf16[4,6]{1,0}, /*index=3*/bf16[6,5]{1,0}) \
parameter(0)
  %x = bf16[8,4,6]{2,1,0} get-tuple-element(%b0), index=1
  %y = bf16[4,6]{1,0} get-tuple-element(%b0), index=2
  %w = bf16[6,5]{1,0} get-tuple-element(%b0), index=3
BODY
}

%condition (k0: (s32[], bf16[8,4,6], bf16[4,6], bf16[6,5])) -> pred[] {
  %k0 = (s32[], bf16[8,4,6]{2,1,0}, bf16[4,6]{1,0}, bf16[6,5]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%k0, %k0), direction=LT
}
"""
WHILE = (
    "  %while = (s32[], bf16[8,4,6]) while(%tuple), condition=%condition, body=%body"
    ', backend_config={"known_trip_count":{"n":"7"}}'
)


def test_inside_a_loop_it_is_launched_as_often_as_the_loop_turns():
    loop = LOOP.replace("BODY", "\n".join((START, CALL, DONE)))
    found = only(program(WHILE, before=NESTED + loop))
    assert (found.computation, found.times) == ("body", 7)
    assert [m.flops for m in found.under] == [240]
    unknown = WHILE[: WHILE.index(", backend_config")]
    found = only(program(unknown, before=NESTED + loop))
    assert found.times is None
    assert hlo.table([found]).splitlines()[1].split()[2] == "*"


def test_a_loop_hides_with_what_its_known_turns_multiply():
    loop = LOOP.replace("BODY", CALL)
    found = only(program(START, WHILE, DONE, before=NESTED + loop))
    assert [m.flops for m in found.under] == [7 * 240]
    unknown = WHILE[: WHILE.index(", backend_config")]
    assert only(program(START, unknown, DONE, before=NESTED + loop)).exposed


def test_copies_in_a_loop_of_what_it_carries():
    lines = (
        "  %same = bf16[8,4,6]{0,1,2} copy(%x)",
        "  %other = bf16[8,4,5]{2,1,0} copy(%z)",
        "  %begun = (bf16[4,6]{1,0}, bf16[4,6]{1,0}, u32[]) copy-start(%y)",
        "  %sum = bf16[8,4,6]{2,1,0} add(%x, %x)",
    )
    loop = LOOP.replace("BODY", "\n".join(lines))
    text = program(WHILE, "  %out = bf16[8,4,6]{2,1,0} copy(%x)", before=NESTED + loop)
    expected = [hlo.Copy("body", "same", 384), hlo.Copy("body", "begun", 48)]
    assert hlo.carried_copies(text) == expected


@pytest.mark.parametrize("branch, hidden", [("called", True), ("nothing", False)])
def test_a_conditional_hides_with_its_least_branch(branch: str, hidden: bool):
    conditional = (
        "  %cond = f32[4,5]{1,0} conditional(%flag, %y, %w), "
        f"branch_computations={{%called, %{branch}}}"
    )
    assert only(program(START, conditional, DONE)).exposed != hidden
    old = (
        "  %cond = f32[4,5]{1,0} conditional(%flag, %y, %w), "
        f"true_computation=%called, false_computation=%{branch}"
    )
    assert only(program(START, old, DONE)).exposed != hidden


def test_a_collective_in_a_branch_counts_as_launched_perhaps():
    branch = "\n".join(
        (
            "%branch (x: bf16[8,4,6]) -> bf16[8,4,6] {",
            "  %x = bf16[8,4,6]{2,1,0} parameter(0)",
            START,
            DONE,
            "}",
        )
    )
    line = "  %c = f32[4,5] conditional(%flag, %x), branch_computations={%branch}"
    found = only(program(line, CALL, before=NESTED + branch))
    assert found.times is None and found.exposed


def test_products_of_libraries_and_other_streams_count():
    library = (
        "  %lib = (f32[4,5]{1,0}, s8[64]{0}) custom-call(%y, %w), "
        'custom_call_target="__cublas$lt$matmul", metadata={op_name="f/shared/dot"}, '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
    )
    found = only(program(START, library, DONE))
    assert found.under == (hlo.Matmul("lib", "f/shared/dot", 240),)
    stream = (
        "  %fusion-start = ((bf16[4,6], bf16[6,5]), f32[4,5], u32[]) "
        "fusion-start(%y, %w), kind=kCustom, calls=%fused"
    )
    waiting = "  %fusion-done = f32[4,5] fusion-done(%fusion-start)"
    assert len(only(program(START, stream, waiting, DONE)).under) == 1
    assert only(program(stream, START, waiting, DONE)).exposed
    other = '  %k = f32[4,5] custom-call(%y), custom_call_target="Sharding"'
    assert only(program(START, other, DONE)).exposed


def test_a_send_goes_on_to_the_end_of_its_computation():
    send = (
        "  %send = (bf16[4,6], u32[], token[]) send(%y, %flag), channel_id=2, "
        "frontend_attributes={_xla_send_recv_source_target_pairs={{0,1}}}"
    )
    found = only(program(send, CALL))
    assert (found.kind, found.groups, len(found.under)) == ("send", (), 1)
    assert found.bytes == 4 * 6 * 2 + 1  # with the flag
    done = "  %send-done = token[] send-done(%send)"
    assert only(program(send, done, CALL)).exposed


def groups(text: str, devices: int = 8) -> np.ndarray:
    return np.array(hlo_text.replica_groups(f"dimensions={{0}}, {text}", devices))


def test_replica_groups_in_every_form():
    ids = np.arange(16).reshape(2, 2, 2, 2)
    mesh = "replica_groups=mesh['data'=2,'fsdp'=2,'node'=2,'expert'=2]"
    assert (groups(f"{mesh} {{'node','expert'}}, x=1") == ids.reshape(4, 4)).all()
    assert (groups(f"{mesh} {{'node'}}") == ids.swapaxes(2, 3).reshape(8, 2)).all()
    along = ids.transpose(1, 2, 0, 3).reshape(4, 4)
    assert (groups(f"{mesh} {{'data','expert'}}") == along).all()
    swapped = ids.transpose(1, 2, 3, 0).reshape(4, 4)
    assert (groups(f"{mesh} {{'expert','data'}}") == swapped).all()
    parts = np.arange(8).reshape(2, 2, 2)
    eight = "replica_groups=mesh['a'=8]"
    assert (groups(f"{eight} {{'a':(1)2}}") == parts.reshape(2, 4).T).all()
    middle = parts.transpose(0, 2, 1).reshape(4, 2)
    assert (groups(f"{eight} {{'a':(2)2}}") == middle).all()
    iota = groups("replica_groups=[4,2]<=[2,4]T(1,0), x=1")
    assert (iota == np.arange(8).reshape(2, 4).T.reshape(4, 2)).all()
    assert (groups("replica_groups=[2,4]<=[8]") == np.arange(8).reshape(2, 4)).all()
    assert groups("replica_groups={{0,2},{1,3}}").tolist() == [[0, 2], [1, 3]]
    assert groups("source_target_pairs={{0,1},{1,0}}").tolist() == [[0, 1], [1, 0]]
    assert groups("replica_groups={}", 4).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="a form that is not known"):
        groups("replica_groups=ring(8)")


@pytest.mark.parametrize(
    "kind, size",
    [
        ("bf16[8,4]{1,0:T(8,128)(2,1)}", 64),
        ("(f32[3]{0}, (s8[5]{0}, pred[2]{0}), u32[], token[])", 12 + 5 + 2 + 4),
        ("f8e4m3fn[128,2]{1,0:S(1)}", 256),
        ("s4[5]{0}", 3),
        ("c64[2]", 16),
        ("f64[<=4]", 32),
    ],
)
def test_bytes_of_types(kind: str, size: int):
    assert hlo_text.nbytes(kind) == size


def test_scopes_are_whole_words_of_a_path():
    inside = ("shared", "a/shared/b", "a/shared", "a/shared.first/up")
    inside += ("jit(f)/transpose(jvp(shared))/dot",)
    outside = ("ashared/b", "a/shared_up/b", "a/shared.1", "", "unshared")
    assert all(hlo.in_scope(name, "shared") for name in inside)
    assert not any(hlo.in_scope(name, "shared") for name in outside)


@pytest.mark.parametrize("text", ["", "HloModule f, entry={}\n", "ENTRY %f {\n}\n"])
def test_what_is_no_scheduled_program_is_refused(text: str):
    with pytest.raises(ValueError, match="compiled program"):
        hlo.collectives(text)
