"""Block-grouped products on Hopper, in bfloat16: each block's rows by its expert.

A tile of the result is one block of rows by 256 columns; the copying warpgroup reads
which expert the block is of and brings that one's weights. Blocks that are not used are
tiles of no steps: their zeros are stored and nothing is read. SwiGLU's two products
have tiles of 128 columns each, so that both sums are in registers at once, and one tile
of rows for both. The weight gradient has a tile for every expert, whose steps are the
blocks of that expert, in whatever order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.matmul import mosaic_gpu as gpu

Array = jax.Array
plgpu: Any = mosaic_gpu  # typed too loosely for a type checker to be of use

DEPTH = 64  # of K a step: a row of 128 bytes
WIDTH = 256  # columns of a tile, where there are as many
STAGES = 4


def check(x_nbD: tuple[int, ...], w_EDF: tuple[int, ...], *dtypes: Any) -> None:
    """Raises NotImplementedError unless this kernel multiplies such operands.

    Args:
      x_nbD, w_EDF: their shapes.
      dtypes: what they are multiplied in.
    """
    if set(map(jnp.dtype, dtypes)) != {jnp.dtype(jnp.bfloat16)}:
        names = " and ".join(str(jnp.dtype(each)) for each in dtypes)
        raise NotImplementedError(
            f"operands are {names}: the kernel multiplies bfloat16 alone"
        )
    if x_nbD[1] % gpu.ROWS:
        raise NotImplementedError(
            f"blocks have {x_nbD[1]} rows: the kernel wants a multiple of {gpu.ROWS}"
        )
    for name, size in zip("DF", w_EDF[1:], strict=True):
        if size % 8:  # TMA copies rows that begin at multiples of 16 bytes
            raise NotImplementedError(
                f"{name} = {size}: the kernel wants a multiple of 8"
            )


def halved(x_nbD: Array, expert_n: Array, used: Array) -> tuple[Array, ...]:
    """Blocks of 128 rows, a tile's height, and what goes with them."""
    number, rows, width = x_nbD.shape
    parts = rows // gpu.ROWS
    x_nbD = x_nbD.reshape(number * parts, gpu.ROWS, width)
    return x_nbD, jnp.repeat(expert_n, parts), used * parts


def by_expert(expert_n: Array, used: Array, experts: int) -> tuple[Array, ...]:
    """Used blocks in an order of experts; each expert's first in it, and how many."""
    expert_n = jnp.where(jnp.arange(len(expert_n)) < used, expert_n, experts)
    count_E = jnp.bincount(expert_n, length=experts)
    return integers(jnp.argsort(expert_n), jnp.cumsum(count_E) - count_E, count_E)


def integers(*arrays: Array) -> tuple[Array, ...]:
    """Arrays that a kernel reads numbers from."""
    return tuple(jnp.atleast_1d(x).astype(jnp.int32) for x in arrays)


def width_of(columns: int, products: int = 1) -> int:
    """Of a tile: a multiple of 128."""
    return min(WIDTH // products, pl.cdiv(columns, 128) * 128)


def in_turn(i: Array, down: int, across: int) -> tuple[Array, Array]:
    """A tile's row and column: eight rows at a time, whose operands stay in the L2."""
    return plgpu.planar_snake(i, (down, across), 0, 8)


def summed(run: Any, width: int, multiply: Any, products: int = 1) -> list[Array]:
    """The sums that `multiply(sum_refs, *buffers)` adds to in all steps of a tile."""

    def product(*sum_refs: Any) -> list[Array]:
        run(lambda step, buffers, carry: multiply(sum_refs, *buffers), None)
        return [sum_ref[...] for sum_ref in sum_refs]

    half = gpu.ROWS // gpu.COMPUTE
    return pl.run_scoped(product, *[plgpu.ACC((half, width), jnp.float32)] * products)


def blocks(
    x_nbD: Array,
    w_EDF: Array,
    expert_n: Array,
    used: Array,
    contract: int,
    dtype: Any,
    interpret: Any = None,
) -> Array:
    """See `reference.Products`."""
    routing = expert_n, used, contract == -1
    ending = _Ending(lambda y: [y], (dtype,))
    return _blocks(x_nbD, (w_EDF,), *routing, ending, interpret)[0]


def swiglu(
    x_nbD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    weight_nb: Array | None,
    expert_n: Array,
    used: Array,
    keep: bool,
    dtype: Any,
    interpret: Any = None,
) -> Sequence[Array]:
    """See `reference.Products`."""

    def results(gate: Array, up: Array, *weight: Array) -> list[Array]:
        hidden = gate / (1 + jnp.exp(-gate)) * up
        for each in weight:
            hidden = hidden * each
        return [hidden, gate, up] if keep else [hidden]

    kept = (jnp.float32, jnp.float32) if keep else ()
    ending = _Ending(results, (dtype, *kept), weight_nb)
    weights = gate_EDF, up_EDF
    return _blocks(x_nbD, weights, expert_n, used, False, ending, interpret)


class _Ending(NamedTuple):
    """What becomes of a tile's sums.

    Attributes:
      results: (*sums, factor if any) -> what is stored.
      dtypes: of these.
      factor_nb: a number for each row.
    """

    results: Callable[..., list[Array]]
    dtypes: tuple[Any, ...]
    factor_nb: Array | None = None


def _blocks(
    x_nbD: Array,
    weights: tuple[Array, ...],
    expert_n: Array,
    used: Array,
    turned: bool,
    ending: _Ending,
    interpret: Any,
) -> list[Array]:
    """`ending` of each block's products with `weights`."""
    shape = x_nbD.shape
    x_nbD, expert_n, used = halved(x_nbD, expert_n, used)
    number, _, depth = x_nbD.shape
    products = len(weights)
    columns = weights[0].shape[1 if turned else 2]
    width = width_of(columns, products)
    across = pl.cdiv(columns, width)
    factors = []
    if ending.factor_nb is not None:
        factors.append(ending.factor_nb.reshape(number, gpu.ROWS).astype(jnp.float32))
    inputs = x_nbD, *weights, *integers(expert_n, used), *factors
    out = [
        jax.ShapeDtypeStruct((number, gpu.ROWS, columns), jnp.dtype(dtype))
        for dtype in ending.dtypes
    ]
    kinds = sorted({each.dtype for each in out}, key=str)

    def body(*refs: Any) -> None:
        x, *w, expert, used = refs[: products + 3]
        factor_refs = refs[products + 3 : len(inputs)]
        made = refs[len(inputs) : len(inputs) + len(out)]
        buffers = dict(zip(kinds, refs[len(inputs) + len(out) :], strict=True))

        def along(step: Array) -> Any:
            return pl.ds(step * DEPTH, DEPTH)

        def right(place: Any) -> Any:
            return pl.ds(place[1] * width, width)

        def weight(ref: Any, place: Any, step: Array) -> Any:
            at = (along(step), right(place))
            return ref.at[(expert[place[0]], *(at[::-1] if turned else at))]

        def of_rows(factor: Any, place: Any) -> Array:
            factor = factor.at[place[0], gpu.rows()]
            layout = plgpu.Layout.WGMMA.reduce(1)
            value = plgpu.load(factor, layout=layout, optimized=False)
            return lax.broadcast_in_dim(value, (len(value), width), [0])

        def compute(place: Any, run: Any) -> None:
            def multiply(sum_refs: Any, x_s: Any, *w_s: Any) -> None:
                for sum_ref, each_s in zip(sum_refs, w_s, strict=True):
                    each_s = each_s.transpose((1, 0)) if turned else each_s
                    plgpu.wgmma(sum_ref, x_s.at[gpu.rows()], each_s)

            sums = summed(run, width, multiply, products)
            values = ending.results(*sums, *(of_rows(f, place) for f in factor_refs))
            for value, ref in zip(values, made, strict=True):
                at = ref.at[place[0], :, right(place)]
                gpu.store(value, buffers[ref.dtype], at)

        tile = (width, DEPTH) if turned else (DEPTH, width)
        operands = [
            gpu.Operand(
                (gpu.ROWS, DEPTH), x.dtype, lambda p, k: x.at[p[0], :, along(k)]
            ),
            *(
                gpu.Operand(tile, ref.dtype, functools.partial(weight, ref))
                for ref in w
            ),
        ]
        steps = pl.cdiv(depth, DEPTH)
        tiles = gpu.Tiles(
            number=number * across,
            place=lambda i: in_turn(i, number, across),
            steps=lambda place: jnp.where(place[0] < used[0], steps, 0),
            compute=compute,
            behind=1,
            products=products,
        )
        gpu.run(tiles, operands, STAGES)

    kernel = gpu.kernel(
        body,
        out,
        number * across,
        scratch=[gpu.store_buffer(dtype, len(kinds)) for dtype in kinds],
        interpret=interpret,
    )
    made = kernel(*inputs)
    return [y_nbF.reshape(*shape[:2], columns) for y_nbF in made]


def weight_gradient(
    x_nbD: Array,
    g_nbF: Array,
    expert_n: Array,
    used: Array,
    experts: int,
    dtype: Any,
    interpret: Any = None,
) -> Array:
    """See `reference.Products`."""
    x_nbD, expert_n, used = halved(x_nbD, expert_n, used)
    g_nbF = g_nbF.reshape(*x_nbD.shape[:2], -1)
    rows, columns = x_nbD.shape[-1], g_nbF.shape[-1]
    width = width_of(columns)
    down, across = pl.cdiv(rows, gpu.ROWS), pl.cdiv(columns, width)
    parts = gpu.ROWS // DEPTH  # steps a block

    def body(
        x: Any, g: Any, order: Any, first: Any, count: Any, out: Any, buffers: Any
    ) -> None:
        def block(place: Any, step: Array) -> Array:
            return order[first[place[0]] + lax.div(step, parts)]

        def along(step: Array) -> Any:
            return pl.ds(lax.rem(step, parts) * DEPTH, DEPTH)

        def left(place: Any) -> Any:
            return pl.ds(place[1] * gpu.ROWS, gpu.ROWS)

        def right(place: Any) -> Any:
            return pl.ds(place[2] * width, width)

        def place(i: Array) -> Any:
            expert, within = lax.div(i, down * across), lax.rem(i, down * across)
            return (expert, *in_turn(within, down, across))

        def compute(place: Any, run: Any) -> None:
            def multiply(sum_refs: Any, x_s: Any, g_s: Any) -> None:
                x_s = x_s.at[:, gpu.rows()].transpose((1, 0))
                plgpu.wgmma(sum_refs[0], x_s, g_s)

            (value,) = summed(run, width, multiply)
            gpu.store(value, buffers, out.at[place[0], left(place), right(place)])

        operands = [
            gpu.Operand(
                (DEPTH, gpu.ROWS),
                x.dtype,
                lambda p, k: x.at[block(p, k), along(k), left(p)],
            ),
            gpu.Operand(
                (DEPTH, width),
                g.dtype,
                lambda p, k: g.at[block(p, k), along(k), right(p)],
            ),
        ]
        tiles = gpu.Tiles(
            number=experts * down * across,
            place=place,
            steps=lambda place: count[place[0]] * parts,
            compute=compute,
            behind=1,
        )
        gpu.run(tiles, operands, STAGES)

    kernel = gpu.kernel(
        body,
        jax.ShapeDtypeStruct((experts, rows, columns), dtype),
        experts * down * across,
        scratch=[gpu.store_buffer(dtype)],
        interpret=interpret,
    )
    return kernel(x_nbD, g_nbF, *by_expert(expert_n, used, experts))
