"""DeepSeek-V3 as one Linen module (arXiv:2412.19437, section 2).

Embedding, a scanned stack of dense blocks, a scanned stack of MoE blocks, the final
norm, and the MTP chain. It ends at hidden states: logits are the caller's, in chunks if
it likes.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import DenseBlock, MoEBlock, rematerialised
from deepseek_jax.model.linear import RMSNorm, embed, initializer
from deepseek_jax.model.moe import Aux
from deepseek_jax.model.mtp import MTPModule
from deepseek_jax.ops.balancing import Balancer, Context
from deepseek_jax.ops.rope import rotation
from deepseek_jax.runtime import Runtime
from deepseek_jax.typing import Array

# Collections of variables that only observers fill: `train.numerics`.
OBSERVED = ("operands", "output_gradients")


class Totals(NamedTuple):
    """What is counted over the whole global batch before its first micro-batch.

    Entry 0 is the main model's, entry k MTP module k's.
    """

    targets: Array  # [1+J] valid targets
    tokens: Array  # [1+J] valid input positions
    rows: Array  # [1+J] rows with at least one
    load: Array | None = None  # [R, E] counts of a first pass, for a batch-wide penalty


class Output(NamedTuple):
    """Normed hidden states, ready for the head, and the routers' reports."""

    hidden_BLD: Array
    mtp_JBLD: tuple[Array, ...]
    aux: Aux  # every array with a leading axis over the R routers, MTP's last


def marks(segment: Array | None, valid: Array | None, like: Array) -> Array:
    """The same positive number all over a document, 0 at padding.

    Shaped like the tokens `like`; without `segment` all that is real is one document.
    """
    mark = jnp.ones_like(like) if valid is None else valid.astype(jnp.int32)
    return mark if segment is None else mark * segment


def reaches(k: int, length: int, mark_BS: Array) -> Array:
    """Where positions i and i+k carry the same non-zero mark, bool [B, length]."""
    here, there = mark_BS[:, :length], mark_BS[:, k : k + length]
    return (here > 0) & (here == there)


def report(auxes: list[Aux]) -> Aux:
    """Concatenates reports along their router axis."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *auxes)


class Transformer(nn.Module):
    """The model; `balancer` gives the rule of selection and what is observed of it."""

    config: ModelConfig
    rt: Runtime
    balancer: Balancer

    def setup(self) -> None:
        config, rt = self.config, self.rt
        init = initializer(config)
        self.embed = self.param("embed", init, (config.vocab_size, config.dim))
        self.head = self.param("head", init, (config.dim, config.vocab_size))

        def stack(block: type[nn.Module], length: int, in_axes: tuple) -> Any:
            return nn.scan(
                rematerialised(block, rt),
                variable_axes={"params": 0, **dict.fromkeys(OBSERVED, 0)},
                split_rngs={"params": True},
                in_axes=in_axes,
                length=length,
            )

        if config.num_dense:
            scanned = stack(DenseBlock, config.num_dense, (nn.broadcast, nn.broadcast))
            self.dense = scanned(config, rt)
        layers = Context(nn.broadcast, nn.broadcast, nn.broadcast, 0)
        scanned = stack(
            MoEBlock, config.num_moe, (0, layers, nn.broadcast, nn.broadcast)
        )
        self.moe = scanned(config, rt, self.balancer)
        self.norm = RMSNorm(config)
        self.mtp = [
            MTPModule(config, rt, self.balancer) for _ in range(config.mtp.depth)
        ]

    def __call__(
        self,
        tokens_BS: Array,
        position_BL: Array,
        balance: Any,
        segment_BS: Array | None = None,
        valid_BS: Array | None = None,
        totals: Totals | None = None,
    ) -> Output:
        """Runs the main model over L positions and S - L MTP modules over the same.

        Args:
          tokens_BS: token ids, S = L + the number of MTP modules to run. position_BL:
          positions for RoPE. balance: balancer state with a leading axis over the R
          routers. segment_BS: document numbers; attention and MTP stay inside one.
          None: no bounds. valid_BS: False at padding, which no load or penalty counts.
          None: all real. totals: global counts that penalties divide by. None: this
          batch is all there is.
        """
        length = position_BL.shape[1]
        depth = tokens_BS.shape[1] - length
        if not 0 <= depth <= self.config.mtp.depth:
            raise ValueError(
                f"{tokens_BS.shape[1]} columns of tokens, {length} positions ask for "
                f"{depth} MTP modules; the model has {self.config.mtp.depth}"
            )
        mark_BS = marks(segment_BS, valid_BS, tokens_BS)
        valid = [reaches(k, length, mark_BS) for k in range(depth + 1)]
        totals = count(valid) if totals is None else totals
        segment_BL = None if segment_BS is None else segment_BS[:, :length]

        x_BSD = embed(self.rt.constrain(self.embed, "embed"), tokens_BS)
        x_BLD = self.rt.constrain(x_BSD[:, :length], "hidden")
        at = self.config.attention
        by = rotation(at.rope, at.rope_dim, position_BL, x_BLD.dtype)
        if self.config.num_dense:
            x_BLD, _ = self.dense(x_BLD, by, segment_BL)

        routers = self.config.num_moe
        states = jax.tree.map(lambda s: s[:routers], balance)
        loads = None if totals.load is None else totals.load[:routers]
        context = Context(valid[0], totals.tokens[0], totals.rows[0], loads)
        x_BLD, aux = self.moe(x_BLD, states, context, by, segment_BL)
        hidden_BLD, auxes, outputs = self.norm(x_BLD), [aux], []

        h_BLD = hidden_BLD if self.config.mtp.input_norm else x_BLD
        for k in range(1, depth + 1):
            router = routers + k - 1
            state = jax.tree.map(lambda s, at=router: s[at], balance)
            loads = None if totals.load is None else totals.load[router]
            context = Context(valid[k], totals.tokens[k], totals.rows[k], loads)
            raw, normed, aux = self.mtp[k - 1](
                h_BLD, x_BSD[:, k : k + length], state, context, by, segment_BL
            )
            h_BLD = normed if self.config.mtp.input_norm else raw
            outputs.append(normed)
            auxes.append(jax.tree.map(lambda a: a[None], aux))
        return Output(hidden_BLD, tuple(outputs), report(auxes))

    def logits(self, hidden_BLD: Array) -> Array:
        """The shared output head, [B, L, V]."""
        flat_TD = hidden_BLD.reshape(-1, self.config.dim)
        return self.rt.dot(flat_TD, self.head).reshape(*hidden_BLD.shape[:2], -1)


def count(valid: list[Array]) -> Totals:
    """Totals of one batch, from the valid positions [B, L] of the main model and each
    MTP.
    """
    tokens = jnp.stack([v.sum() for v in valid])
    rows = jnp.stack([v.any(1).sum() for v in valid])
    return Totals(tokens, tokens, rows)
