"""Two programs side by side compute what each computes alone, and wait as they must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from deepseek_jax.parallel.pipeline import interleave

RANKS, ROWS, DIM = 4, 8, 6


def swap(x):
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def long(w, x):
    """Three exchanges, under all that may wrap an operation."""
    x = jax.checkpoint(lambda x: jnp.tanh(swap(x @ w)))(x)
    x = jax.jit(lambda x: swap(doubled(x)) @ w)(x)
    useless = swap(x + 1)
    del useless
    return swap(x), {"sum": x.sum(), "given": w, "constant": 3}


def short(w, x):
    return swap(jnp.sin(x)) @ w + np.arange(DIM)


def none(w, x):
    return jnp.cos(x) @ w


def gradient(of):
    """Its backward pass, which has exchanges of its own."""
    return lambda w, x: jax.grad(lambda w, x: of(w, x)[0].sum(), (0, 1))(w, x)


def on_devices(function):
    devices = np.array(jax.devices()[:RANKS])
    mesh = Mesh(devices, ("expert",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("expert")
    return jax.jit(
        jax.shard_map(
            lambda *given: jax.tree.map(
                lambda x: jnp.asarray(x)[None], function(*given)
            ),
            mesh=mesh,
            in_specs=(PartitionSpec(), rows, rows),
            out_specs=rows,
            check_vma=False,
        )
    )


def arrays():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(DIM, DIM))
    return w, *rng.normal(size=(2, RANKS * ROWS, DIM))


@pytest.mark.parametrize("first", [long, short, none, gradient(long)])
@pytest.mark.parametrize("second", [long, short, none, gradient(long)])
def test_results_are_those_of_either_alone(first, second):
    def both(w, x, y):
        return interleave.side_by_side(first, second, (w, x), (w, y))

    def apart(w, x, y):
        return first(w, x), second(w, y)

    with jax.enable_x64(True):
        given = arrays()
        got, want = on_devices(both)(*given), on_devices(apart)(*given)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12), got, want
        )


def primitives(function):
    """Names of a function's operations, in order, and their variables."""

    def traced(w, x, y):
        jaxpr = jax.make_jaxpr(function)(w, x, y).jaxpr
        found.extend(
            (e.primitive.name, set(map(id, e.invars)), set(map(id, e.outvars)))
            for e in interleave.flat(jaxpr).equations
        )
        return x

    found: list = []
    on_devices(traced).lower(*map(jnp.asarray, arrays()))
    return found


def test_an_exchange_starts_when_the_other_programs_has_arrived():
    def both(w, x, y):
        return interleave.side_by_side(long, short, (w, x), (w, y))

    names = [name for name, *_ in primitives(both)]
    order = [n for n in names if n in ("all_to_all", "optimization_barrier")]
    # long 1 | short 1 waits for it | long 2 waits for that | long 3 has no company
    assert order == [
        "all_to_all",
        *["optimization_barrier", "all_to_all"] * 2,
        "all_to_all",
    ]


def test_what_nobody_reads_is_left_out():
    names = [name for name, *_ in primitives(long_only)]
    assert names.count("all_to_all") == 3
    assert not {"jit", "remat2", "custom_vjp_call"} & set(names)


def long_only(w, x, y):
    return long(w, x)
