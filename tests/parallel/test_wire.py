"""What is sent: payloads against their definitions, and the ragged exchange."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import PAYLOADS, MeshConfig
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel import wire
from pallas_kernels.fp8_quantize.reference import TILE, dequantize, quantize

RNG = np.random.default_rng(0)


def sent(x: jax.Array, payload: str) -> tuple[jax.Array, int]:
    """What arrives, and the bytes that were sent."""
    encode, decode = wire.PAYLOADS[payload]
    parts = encode(x)
    return decode(*parts, x.dtype), sum(part.nbytes for part in parts)


def test_every_payload_of_the_config_exists():
    assert set(wire.PAYLOADS) == set(PAYLOADS)


@pytest.mark.parametrize(
    ("payload", "size"),
    [("exact", 28672), ("bf16", 14336), ("fp8", 7392), ("fp8_ue8m0", 7224)],
)
def test_bytes_of_a_copy_at_the_width_of_v3(payload, size):
    x = jnp.asarray(RNG.normal(size=(3, 7168)), jnp.float32)
    assert sent(x, payload)[1] == 3 * size


def test_payloads_arrive_as_they_should():
    scale = np.exp(RNG.normal(size=(50, 1)) * 20)  # from 1e-20 to 1e20
    x = jnp.asarray(RNG.normal(size=(50, 300)) * scale, jnp.float32).at[7].set(0)
    np.testing.assert_array_equal(sent(x, "exact")[0], x)
    np.testing.assert_array_equal(sent(x, "bf16")[0], x.astype(jnp.bfloat16))
    got = np.asarray(sent(x, "fp8")[0])
    np.testing.assert_array_equal(sent(x, "fp8_ue8m0")[0], got)
    assert np.abs(got - x).max() > 0
    for start in range(0, 300, 128):  # three bits after the first: half of 2^-3 at most
        tile = slice(start, start + 128)
        largest = np.abs(x[:, tile]).max(1, keepdims=True)
        assert (np.abs(got - x)[:, tile] <= largest / 16).all()
    ordinary = jnp.asarray(RNG.normal(size=(50, 300)), jnp.float32)
    want = dequantize(*quantize(ordinary, TILE, power_of_two=True), TILE)
    np.testing.assert_array_equal(sent(ordinary, "fp8")[0], want)


def test_the_ragged_exchange_is_what_it_stands_for():
    """Against a plain loop over pairs of ranks, with gaps in both buffers."""
    ranks, here, there, width = 8, 24, 40, 3
    sizes = RNG.integers(0, 4, (ranks, ranks))
    starts = np.cumsum(sizes, 1) - sizes + 1
    ends = np.cumsum(sizes, 0) - sizes + 2
    x = RNG.normal(size=(ranks, here + 9, width)).astype(np.float32)
    want = np.full((ranks, there, width), 5, np.float32)
    for i in range(ranks):
        for j in range(ranks):
            rows = x[i, starts[i, j] : starts[i, j] + sizes[i, j]]
            want[j, ends[i, j] : ends[i, j] + sizes[i, j]] = rows
    mesh = meshes.make(MeshConfig(node=2, expert=4))

    def exchange(x, *where):
        out = jnp.full((there, width), 5, jnp.float32)
        args = [a[0] for a in (x, *where)]
        got = wire.ragged_all_to_all(args[0], out, *args[1:], axis_name=meshes.EXPERTS)
        return got[None]

    rows = P(mesh.axis_names)
    got = jax.jit(
        jax.shard_map(
            exchange, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
        )
    )(x, starts, sizes, ends, sizes.T)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("room", [1, 3, 6])
def test_a_row_is_copied_once_to_each_rank(room):
    """The plan against sets: who goes where, and whether there was room."""
    ranks, tokens, top_k = 4, 6, 3
    rank_tK = RNG.integers(0, ranks + 1, (tokens, top_k))  # 4 is nowhere
    plan = jax.jit(functools.partial(wire.plan, ranks=ranks, room=room))
    hop, fits = plan(rank_tK)
    row_Rc = np.asarray(hop.row_s).reshape(ranks, room)
    for rank in range(ranks):
        going = [t for t in range(tokens) if rank in rank_tK[t]]
        came = [t for t in row_Rc[rank] if t < tokens]
        assert came == going[:room]
    counts = [(rank_tK == rank).any(1).sum() for rank in range(ranks)]
    assert bool(fits) == (max(counts) <= room)
    for t in range(tokens):
        places = [p for p in np.asarray(hop.place_tK)[t] if p < ranks * room]
        assert sorted(places) == [
            place for place, row in enumerate(hop.row_s.tolist()) if row == t
        ]
