"""What the benchmark runs: each operation's inputs, its work, and who can do it.

Work is what the operation cannot do without: its multiplications (of a causal mask only
what it lets through), and every operand read and every result written once.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.choice import MOSAIC_GPU, XLA
from pallas_kernels.flash_mla import shapes as flash_shapes
from pallas_kernels.flash_mla.api import flash_mla
from pallas_kernels.fp8_matmul import shapes as fp8_shapes
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.fp8_quantize import shapes as quantize_shapes
from pallas_kernels.fp8_quantize.api import (
    quantize,
    quantize_rms_norm,
    quantize_swiglu,
)
from pallas_kernels.fp8_quantize.reference import BLOCK, TILE
from pallas_kernels.grouped_fp8_matmul.api import grouped_fp8_matmul
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.grouped_matmul.api import grouped_dot, grouped_swiglu
from pallas_kernels.grouped_matmul.reference import gated
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.mla_decode.api import mla_decode

Array = jax.Array
Run = Callable[[], Any]  # starts the work; what it returns is waited for

BF16, F32 = jnp.bfloat16, jnp.float32
OURS = XLA, MOSAIC_GPU


class Case(NamedTuple):
    """One operation on one shape.

    Attributes:
      flops, bytes: see above.
      candidates: by name, functions that make inputs and return what to time.
    """

    flops: float
    bytes: float
    candidates: dict[str, Callable[[], Run]]


def _normal(*shapes: tuple[int, ...], dtype: Any = BF16) -> tuple[Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )


def _jitted(function: Callable[..., Any], inputs: Callable[[], Any]) -> Run:
    return functools.partial(jax.jit(function), *jax.block_until_ready(inputs()))


def _ours(
    function: Callable[..., Any], inputs: Callable[[], Any]
) -> dict[str, Callable[[], Run]]:
    """Candidates of an operation that takes `implementation`."""
    return {
        name: functools.partial(
            _jitted, functools.partial(function, implementation=name), inputs
        )
        for name in OURS
    }


def _size(inputs: Callable[[], Any], *results: tuple[int, Any]) -> float:
    """Bytes of inputs, and of results given as (elements, dtype)."""
    read = sum(x.size * x.dtype.itemsize for x in jax.eval_shape(inputs))
    return read + sum(n * jnp.dtype(dtype).itemsize for n, dtype in results)


def with_gradient(function: Callable[..., Array], count: int) -> Callable[..., Any]:
    """`function` and its gradients by the first `count` arguments."""

    def run(*args: Array, **named: Any) -> Any:
        def of(*floats: Array) -> Array:
            return function(*floats, *args[count:], **named)

        value, pull = jax.vjp(of, *args[:count])
        return value, pull(jnp.ones_like(value))

    return run


def fp8_cases(shape: fp8_shapes.Shape) -> Iterator[tuple[str, Case]]:
    M, N, K, by_block = shape

    def inputs() -> tuple[Array, ...]:
        a, b = _normal((M, K), (N, K))
        return *quantize(a), *quantize(b, BLOCK if by_block else TILE)

    def rows() -> tuple[Array, ...]:
        return _normal((M, K), (N, K))

    out = BF16 if by_block else F32
    candidates = _ours(functools.partial(fp8_matmul, out_dtype=out), inputs)
    candidates["xla, bf16"] = functools.partial(
        _jitted, lambda a, b: jnp.dot(a, b.T, preferred_element_type=out), rows
    )
    candidates["torch, bf16"] = functools.partial(_torch_matmul, M, N, K)
    candidates["torch, _scaled_mm"] = functools.partial(_torch_scaled, M, N, K)
    yield "forward", Case(2 * M * N * K, _size(inputs, (M * N, out)), candidates)


def quantize_cases(shape: quantize_shapes.Shape) -> Iterator[tuple[str, Case]]:
    M, N, block, turned = shape

    def inputs() -> tuple[Array, ...]:
        return _normal((M, N))

    call = functools.partial(quantize, block=block, turned=turned)
    made = (M * N, jnp.float8_e4m3fn), (M * N // (block[0] * block[1]), F32)
    yield "forward", Case(0, _size(inputs, *made), _ours(call, inputs))
    if block != TILE:
        return

    def gated() -> tuple[Array, ...]:
        """In float32, as products come."""
        return tuple(each.astype(F32) for each in _normal((M, N), (M, N)))

    def normed() -> tuple[Array, ...]:
        return *_normal((M, N)), jnp.ones(N)

    swiglu = functools.partial(quantize_swiglu, turned=turned)
    norm = functools.partial(quantize_rms_norm, eps=1e-6, turned=turned)
    yield "of SwiGLU", Case(0, _size(gated, *made), _ours(swiglu, gated))
    yield "of RMSNorm", Case(0, _size(normed, *made), _ours(norm, normed))


def _routing(shape: grouped_shapes.Shape) -> tuple[Array, Array]:
    each = -(-shape.used // shape.E)
    expert_n = jnp.minimum(jnp.arange(shape.n) // each, shape.E - 1)
    return expert_n, jnp.int32(shape.used)


def grouped_cases(shape: grouped_shapes.Shape) -> Iterator[tuple[str, Case]]:
    n, experts, D, F, used, rows = shape
    if not used:
        return
    flops = 2.0 * used * rows * D * F

    def inputs() -> tuple[Array, ...]:
        return *_normal((n, rows, D), (experts, D, F)), *_routing(shape)

    def ragged(x: Array, w: Array, expert_n: Array, used: Array) -> Array:
        live_n = jnp.where(jnp.arange(n) < used, rows, 0)
        sizes = jnp.zeros(experts, jnp.int32).at[expert_n].add(live_n)
        x = x.reshape(-1, D)
        return lax.ragged_dot(x, w, sizes, preferred_element_type=F32)

    size = _size(inputs, (n * rows * F, F32))
    candidates = _ours(grouped_dot, inputs)
    candidates["xla, ragged_dot"] = functools.partial(_jitted, ragged, inputs)
    yield "forward", Case(flops, size, candidates)
    both = _ours(with_gradient(grouped_dot, 2), inputs)
    yield "forward + backward", Case(3 * flops, 3 * size, both)

    def inputs_of_two() -> tuple[Array, ...]:
        weights = (experts, D, F)
        operands = *_normal((n, rows, D), weights, weights), *_routing(shape)
        return *operands, jnp.ones((n, rows))

    def joined(
        x: Array, gate: Array, up: Array, expert_n: Array, used: Array, weight: Array
    ) -> Array:
        """Without a kernel of its own."""
        both = grouped_dot(x, jnp.concatenate([gate, up], -1), expert_n, used)
        gate, up = jnp.split(both, 2, -1)
        return gated(gate, up, weight).astype(BF16)

    size = _size(inputs_of_two, (n * rows * F, BF16))
    candidates = _ours(grouped_swiglu, inputs_of_two)
    candidates["one grouped_dot"] = functools.partial(_jitted, joined, inputs_of_two)
    yield "SwiGLU", Case(2 * flops, size, candidates)
    both = _ours(with_gradient(grouped_swiglu, 3), inputs_of_two)
    pulled = with_gradient(joined, 3)
    both["one grouped_dot"] = functools.partial(_jitted, pulled, inputs_of_two)
    yield "SwiGLU + backward", Case(6 * flops, 3 * size, both)


def grouped_fp8_cases(shape: grouped_shapes.Shape) -> Iterator[tuple[str, Case]]:
    n, experts, D, F, used, rows = shape
    if not used:
        return

    def inputs() -> tuple[Array, ...]:
        x, w = _normal((n, rows, D), (experts, F, D))
        return *quantize(x), *quantize(w, BLOCK), *_routing(shape)

    size = _size(inputs, (n * rows * F, BF16))
    call = functools.partial(grouped_fp8_matmul, out_dtype=BF16)
    yield "forward", Case(2.0 * used * rows * D * F, size, _ours(call, inputs))


def flash_cases(shape: flash_shapes.Shape) -> Iterator[tuple[str, Case]]:
    B, L, H, G, g, N, R, O, segments = shape  # noqa: E741
    scale = (N + R) ** -0.5

    def inputs() -> tuple[Array, ...]:
        heads = (H, N), (H, R), (G, N), (g, R), (G, O)
        return _normal(*((B, L, *head) for head in heads))

    def joined() -> tuple[Array, ...]:
        """As cuDNN has them: equal heads, of one width."""
        return _normal(*[(B, L, H, N + R)] * 3)

    if segments:
        return
    flops = 1.0 * B * H * L * (L + 1) * (N + R + O)
    size = _size(inputs, (B * L * H * O, F32))
    call = functools.partial(flash_mla, scale=scale, compute_dtype=BF16)
    cudnn = functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    torch = functools.partial(_torch_attention, (B, H, L), (N + R, O))
    candidates = _ours(call, inputs)
    candidates["cudnn, padded"] = functools.partial(_jitted, cudnn, joined)
    candidates["torch, sdpa"] = functools.partial(torch, backward=False)
    yield "forward", Case(flops, size, candidates)
    both = _ours(with_gradient(call, 5), inputs)
    both["cudnn, padded"] = functools.partial(_jitted, with_gradient(cudnn, 3), joined)
    both["torch, sdpa"] = functools.partial(torch, backward=True)
    # Backward: scores again, and four gradients of two products' operands.
    yield "forward + backward", Case(3.5 * flops, 3 * size, both)


def decode_cases(shape: decode_shapes.Shape) -> Iterator[tuple[str, Case]]:
    B, L, H, S, C, R, page = shape

    def inputs() -> tuple[Any, ...]:
        pool = (B * S // page, page) if page else (B, S)
        queries = _normal((B, L, H, C), (B, L, H, R))
        caches = _normal((*pool, C), (*pool, R))
        position = jnp.tile(jnp.arange(S - L, S), (B, 1))
        table = (jnp.arange(B * S // page).reshape(B, -1),) if page else ()
        return *queries, *caches, position, *table

    call = functools.partial(mla_decode, scale=(C + R) ** -0.5, compute_dtype=BF16)
    flops = 2.0 * B * L * H * S * (2 * C + R)
    size = _size(inputs, (B * L * H * C, F32))
    yield "forward", Case(flops, size, _ours(call, inputs))


def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise NotImplementedError("torch is not installed") from error
    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    return torch


def _torch_tensors(*shapes: tuple[int, ...], gradient: bool = False) -> list[Any]:
    torch = _torch()
    named = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": gradient}
    return [torch.randn(shape, **named) for shape in shapes]


def _torch_matmul(M: int, N: int, K: int) -> Run:
    a, b = _torch_tensors((M, K), (N, K))
    return lambda: a @ b.T


def _torch_scaled(M: int, N: int, K: int) -> Run:
    """A scale for each row and column alone: less than what the paper's recipe does."""
    torch = _torch()
    a, b = (x.to(torch.float8_e4m3fn) for x in _torch_tensors((M, K), (N, K)))
    scales = [torch.ones(size, device="cuda") for size in ((M, 1), (1, N))]
    named = {"scale_a": scales[0], "scale_b": scales[1], "out_dtype": torch.bfloat16}
    return lambda: torch._scaled_mm(a, b.T, **named)


def _torch_attention(
    rows: tuple[int, ...], widths: tuple[int, int], backward: bool
) -> Run:
    qk, v = ((*rows, width) for width in widths)
    operands = _torch_tensors(qk, qk, v, gradient=backward)
    attend = _torch().nn.functional.scaled_dot_product_attention

    def run() -> Any:
        out = attend(*operands, is_causal=True)
        if backward:
            out.backward(out.detach())
        return out

    return run


# By operation: its shapes, and the cases of one of them.
OPERATIONS: dict[str, tuple[Any, Callable[..., Iterator[tuple[str, Case]]]]] = {
    "fp8_matmul": (fp8_shapes.SHAPES, fp8_cases),
    "fp8_quantize": (quantize_shapes.SHAPES, quantize_cases),
    "grouped_matmul": (grouped_shapes.SHAPES, grouped_cases),
    "grouped_fp8_matmul": (grouped_shapes.SHAPES, grouped_fp8_cases),
    "flash_mla": (flash_shapes.SHAPES, flash_cases),
    "mla_decode": (decode_shapes.SHAPES, decode_cases),
}
