"""Which tensor of a Hugging Face checkpoint is which slice of which array of ours.

The names and packings are those of DeepSeek's released files (README_WEIGHTS.md and
inference/convert.py of its repository), which transformers shares. One table of rows,
each with a transform; `tensors` is its only interpreter and serves both directions.
What differs in ours: matrices are [in, out]; layers, and experts inside them, are
stacked; rotary numbers are stored as two halves (all even, then all odd) instead of
interleaved pairs; an MTP module projects [hidden; embedding] as the report prints it
(arXiv:2412.19437, equation 21), the files the reverse; a router's bias is the
balancer's state.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from deepseek_jax.checkpoint.streaming import Leaf
from deepseek_jax.config import ModelConfig

Sizes = dict[str, int]

BIAS: Leaf = ("bias",)  # stands for wherever the balancer keeps its biases
AS_IS, MATRIX, HEADS, LATENT = "as is", "matrix", "heads", "latent"
SWAPPED = "swapped"


class Row(NamedTuple):
    """One kind of tensor.

    Both names are relative to a layer's; `ours` may name several arrays, which share
    the rows of the tensor evenly. A tensor with a size of zero does not exist.
    """

    hf: str
    ours: str
    shape: str  # of the file's tensor, in the letters of `sizes`
    transform: str = MATRIX
    fp8: bool = False  # whether an FP8 release quantises it
    copy: bool = False  # repeats a tensor of the main model


MODEL = (
    Row("model.embed_tokens.weight", "embed", "V D", AS_IS),
    Row("model.norm.weight", "norm/scale", "D", AS_IS),
    Row("lm_head.weight", "head", "V D"),
)
LAYER = (
    Row("input_layernorm.weight", "attn_norm/scale", "D", AS_IS),
    Row("self_attn.q_proj.weight", "attn/q_b/kernel", "HX P", HEADS, fp8=True),
    Row("self_attn.q_a_proj.weight", "attn/q_a/kernel", "Q D", fp8=True),
    Row("self_attn.q_a_layernorm.weight", "attn/q_norm/scale", "Q", AS_IS),
    Row("self_attn.q_b_proj.weight", "attn/q_b/kernel", "HX Q", HEADS, fp8=True),
    Row(
        "self_attn.kv_a_proj_with_mqa.weight",
        "attn/kv_a/kernel",
        "CR D",
        LATENT,
        fp8=True,
    ),
    Row("self_attn.kv_a_layernorm.weight", "attn/kv_norm/scale", "C", AS_IS),
    Row("self_attn.kv_b_proj.weight", "attn/kv_b/kernel", "HNO C", fp8=True),
    Row("self_attn.o_proj.weight", "attn/o/kernel", "D HO", fp8=True),
    Row("post_attention_layernorm.weight", "ffn_norm/scale", "D", AS_IS),
)
DENSE = (
    Row("mlp.gate_proj.weight", "ffn/gate/kernel", "I D", fp8=True),
    Row("mlp.up_proj.weight", "ffn/up/kernel", "I D", fp8=True),
    Row("mlp.down_proj.weight", "ffn/down/kernel", "D I", fp8=True),
)
MOE = (
    Row("mlp.gate.weight", "moe/router", "E D"),
    Row("mlp.gate.e_score_correction_bias", "bias", "B", AS_IS),
    Row(
        "mlp.shared_experts.gate_proj.weight", "moe/shared/gate/kernel", "S D", fp8=True
    ),
    Row("mlp.shared_experts.up_proj.weight", "moe/shared/up/kernel", "S D", fp8=True),
    Row(
        "mlp.shared_experts.down_proj.weight", "moe/shared/down/kernel", "D S", fp8=True
    ),
)
EXPERTS = (
    Row("mlp.experts.{e}.gate_proj.weight", "moe/gate", "F D", fp8=True),
    Row("mlp.experts.{e}.up_proj.weight", "moe/up", "F D", fp8=True),
    Row("mlp.experts.{e}.down_proj.weight", "moe/down", "D F", fp8=True),
)
# How transformers 5 holds them in memory; files in this form are never FP8.
STACKED = (
    Row("mlp.experts.gate_up_proj", "moe/gate moe/up", "E FF D"),
    Row("mlp.experts.down_proj", "moe/down", "E D F"),
)
MTP = (
    Row("enorm.weight", "embed_norm/scale", "D", AS_IS),
    Row("hnorm.weight", "hidden_norm/scale", "D", AS_IS),
    Row("eh_proj.weight", "combine/kernel", "D DD", SWAPPED),
    Row("shared_head.norm.weight", "norm/scale", "D", AS_IS),
)
MTP_COPIES = (
    Row("embed_tokens.weight", "embed", "V D", AS_IS, copy=True),
    Row("shared_head.head.weight", "head", "V D", copy=True),
)
# Buffers of old files that can be computed.
IGNORED = ("self_attn.rotary_emb.inv_freq",)


def sizes(model: ModelConfig, bias: bool) -> Sizes:
    """What the letters of the table stand for."""
    at, moe = model.attention, model.moe
    return {
        "V": model.vocab_size,
        "D": model.dim,
        "DD": 2 * model.dim,
        "I": model.dense_dim,
        "HX": at.num_heads * (at.nope_dim + at.rope_dim),
        "HNO": at.num_heads * (at.nope_dim + at.value_dim),
        "HO": at.num_heads * at.value_dim,
        "Q": at.q_rank,
        "P": 0 if at.q_rank else model.dim,  # what an uncompressed query reads
        "C": at.kv_rank,
        "CR": at.kv_rank + at.rope_dim,
        "E": moe.num_experts,
        "B": moe.num_experts if bias else 0,
        "F": moe.ffn_dim,
        "FF": 2 * moe.ffn_dim,
        "S": moe.num_shared * moe.ffn_dim,
    }


def halves(numbers: np.ndarray) -> np.ndarray:
    """Interleaved pairs, reordered to all first numbers, then all second ones."""
    return np.concatenate([numbers[..., 0::2], numbers[..., 1::2]], -1)


def rows_of_heads(model: ModelConfig) -> np.ndarray:
    """File rows of a per-head projection in our order; a head has N rows, then R."""
    at = model.attention
    rows = np.arange(at.num_heads * (at.nope_dim + at.rope_dim))
    heads = rows.reshape(at.num_heads, -1)
    nope, rope = heads[:, : at.nope_dim], heads[:, at.nope_dim :]
    return np.concatenate([nope, halves(rope)], 1).reshape(-1)


def rows_of_latent(model: ModelConfig) -> np.ndarray:
    """File rows of the joint projection in our order: C latent, R rotated."""
    at = model.attention
    rows = np.arange(at.kv_rank + at.rope_dim)
    return np.concatenate([rows[: at.kv_rank], halves(rows[at.kv_rank :])])


def swapped_columns(model: ModelConfig) -> np.ndarray:
    """File columns of the MTP projection in our order: hidden first."""
    return np.roll(np.arange(2 * model.dim), model.dim)


class Transform(NamedTuple):
    """A reordering of rows and columns, then a transposition; exactly invertible.

    Rows stay within a unit; the same order holds for each unit.
    """

    rows: Callable[[ModelConfig], np.ndarray] | None = None
    unit: Callable[[ModelConfig], int] = lambda model: 1
    columns: Callable[[ModelConfig], np.ndarray] | None = None
    transpose: bool = True


TRANSFORMS = {
    AS_IS: Transform(transpose=False),
    MATRIX: Transform(),
    HEADS: Transform(
        rows_of_heads, lambda m: m.attention.nope_dim + m.attention.rope_dim
    ),
    LATENT: Transform(
        rows_of_latent, lambda m: m.attention.kv_rank + m.attention.rope_dim
    ),
    SWAPPED: Transform(columns=swapped_columns),
}


def to_ours(x: np.ndarray, transform: Transform, model: ModelConfig) -> np.ndarray:
    """Rows of a file's tensor, whole units of them, as ours."""
    if transform.rows:
        x = x[transform.rows(model)[: len(x)]]
    if transform.columns:
        x = x[:, transform.columns(model)]
    return x.T if transform.transpose else x


def to_file(x: np.ndarray, transform: Transform, model: ModelConfig) -> np.ndarray:
    """The inverse of `to_ours`."""
    x = x.T if transform.transpose else x
    if transform.columns:
        x = x[:, np.argsort(transform.columns(model))]
    if transform.rows:
        x = x[np.argsort(transform.rows(model)[: len(x)])]
    return np.ascontiguousarray(x)


class Part(NamedTuple):
    """Consecutive rows of a tensor (its leading axes flattened), and where we keep
    them.
    """

    start: int
    rows: int
    leaf: Leaf
    outer: tuple[int, ...]  # into the leading axes of the array: layer, expert
    transform: Transform
    unit: int  # rows that are converted together


class Tensor(NamedTuple):
    """A tensor of the file; `parts` cover it in order."""

    name: str
    shape: tuple[int, ...]
    fp8: bool
    copy: bool
    parts: tuple[Part, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape of one row: (in,), or () of a vector."""
        return self.shape[-1:] if len(self.shape) > 1 else ()


class Scope(NamedTuple):
    """The layer that rows are read for."""

    prefix: str
    root: Leaf
    outer: tuple[int, ...] = ()
    router: int = -1


def tensors(model: ModelConfig, *, bias: bool, stacked: bool = False) -> list[Tensor]:
    """Every tensor that a checkpoint of `model` has, in the order of its layers.

    Args:
      bias: whether routers have one.
      stacked: experts as two tensors a layer instead of three an expert.
    """
    experts = STACKED if stacked else EXPERTS
    found: list[Tensor] = []

    def add(rows: tuple[Row, ...], scope: Scope) -> None:
        for row in rows:
            found.extend(_expand(row, scope, model, sizes(model, bias)))

    params: Leaf = ("params",)
    add(MODEL, Scope("", params))
    for i in range(model.num_layers):
        prefix, moe = f"model.layers.{i}.", i - model.num_dense
        if moe < 0:
            add(LAYER + DENSE, Scope(prefix, (*params, "dense"), (i,)))
        else:
            scope = Scope(prefix, (*params, "moe"), (moe,), moe)
            add(LAYER + MOE + experts, scope)
    for k in range(model.mtp.depth):
        prefix = mtp_prefix(model, k)
        module = (*params, f"mtp_{k}")
        add(MTP_COPIES, Scope(prefix, params))
        add(MTP, Scope(prefix, module))
        scope = Scope(prefix, (*module, "block"), (), model.num_moe + k)
        add(LAYER + MOE + experts, scope)
    return found


def mtp_prefix(model: ModelConfig, k: int) -> str:
    """What the names of MTP module k (from 0) begin with."""
    return f"model.layers.{model.num_layers + k}."


def _expand(
    row: Row, scope: Scope, model: ModelConfig, size: Sizes
) -> Iterator[Tensor]:
    """The tensors of one row in one layer: none, one, or one an expert."""
    shape = tuple(size[letter] for letter in row.shape.split())
    if 0 in shape:
        return
    transform = TRANSFORMS[row.transform]
    leaves: list[Leaf] = [(*scope.root, *name.split("/")) for name in row.ours.split()]
    index = scope.outer
    if row.ours == BIAS[0]:
        leaves, index = [BIAS], (scope.router,)

    def tensor(name: str, indices: list[tuple[int, ...]]) -> Tensor:
        slots = [(leaf, at) for at in indices for leaf in leaves]
        rows = int(np.prod(shape[:-1])) if len(shape) > 1 else shape[0]
        each = rows // len(slots)
        parts = tuple(
            Part(n * each, each, leaf, at, transform, transform.unit(model))
            for n, (leaf, at) in enumerate(slots)
        )
        return Tensor(scope.prefix + name, shape, row.fp8, row.copy, parts)

    experts = [(*index, e) for e in range(model.moe.num_experts)]
    if "{e}" in row.hf:
        for e, at in enumerate(experts):
            yield tensor(row.hf.format(e=e), [at])
    else:
        yield tensor(row.hf, experts if len(shape) == 3 else [index])


def array_shapes(found: list[Tensor]) -> dict[Leaf, tuple[int, ...]]:
    """The shapes of our arrays that `tensors` fill."""
    shapes: dict[Leaf, tuple[int, ...]] = {}
    for tensor in found:
        for part in tensor.parts:
            inner = (part.rows, *tensor.columns)
            inner = inner[::-1] if part.transform.transpose else inner
            outer = tuple(i + 1 for i in part.outer)
            known = shapes.get(part.leaf, ())[: len(outer)]
            outer = tuple(max(pair) for pair in zip(outer, known)) if known else outer
            shapes[part.leaf] = (*outer, *inner)
    return shapes
