"""The whole model: causality, isolation, initial loss, variants, remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import runtime
from deepseek_jax.config import AttentionConfig, RuntimeConfig
from deepseek_jax.model.transformer import Transformer, count, reaches
from deepseek_jax.ops import balancing
from deepseek_jax.train.objective import objective, totals
from deepseek_jax.train.state import assemble, init_balance, init_state
from tests.factory import SMALL, as_f64, random_batch, small


def embedding_gradient(config, batch, depth, row, column):
    """d(output of `depth` at one position) / d(embedding of every token of the row).

    Every position is given a token of its own, so that the gradient of the table's row
    is the gradient of that position's input.
    """
    parts = assemble(config)
    with jax.enable_x64(True):
        state = as_f64(init_state(parts, 0))
        width = batch.tokens.shape[1]
        tokens = np.broadcast_to(np.arange(width, dtype=np.int32), batch.tokens.shape)
        columns = slice(0, width - 1)
        segment = batch.segment[:, columns] if config.data.segment_mask else None

        def probe(table):
            out = parts.model.apply(
                {"params": state.params | {"embed": table}},
                tokens[:, columns],
                batch.position[:, : config.data.length],
                state.balance,
                segment_BS=segment,
                valid_BS=batch.segment[:, columns] > 0,
            )
            return (out.hidden_BLD, *out.mtp_JBLD)[depth][row, column].sum()

        gradient = jax.jit(jax.grad(probe))(state.params["embed"])
    return np.abs(np.asarray(gradient[: width - 1])).max(1)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_output_reads_a_token_it_must_predict(depth):
    config = small(batch=2, depth=2)
    gradient = embedding_gradient(config, random_batch(config), depth, 0, 6)
    assert (gradient[: 7 + depth] > 0).all()
    assert (gradient[7 + depth :] == 0).all()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_nothing_crosses_a_document(depth):
    config = small(batch=2, depth=2, segment_mask=True)
    batch = random_batch(config)
    batch.segment[:] = np.where(np.arange(batch.tokens.shape[1]) < 5, 1, 2)
    gradient = embedding_gradient(config, batch, depth, 0, 8)
    assert (gradient[:5] == 0).all() and (gradient[5 : 9 + depth] > 0).all()
    # position 4 - depth + 1 .. 4 would need a token of document 2: replaced by nothing
    gradient = embedding_gradient(config, batch, depth, 0, 4)
    assert (gradient[:5] > 0).all() and (gradient[5:] == 0).all()


@functools.partial(jax.jit, static_argnums=0)
def evaluated(parts, state, batch):
    """Losses and the routers' report on a batch that is the whole global batch."""
    return objective(
        parts, state.params, state.balance, batch, totals(parts, batch), 0.3
    )[1]


def test_loss_at_init_is_log_vocabulary_and_half_the_logit_variance():
    for std in (0.006, 0.0):
        model = dataclasses.replace(SMALL, init_std=std, vocab_size=512, dim=64)
        config = small(batch=8, length=32, model=model)
        parts = assemble(config)
        state, batch = init_state(parts, 0), random_batch(config)
        losses, _ = evaluated(parts, state, batch)
        variance = 64 * (std or 64**-0.5) ** 2
        want = np.log(512) + variance / 2
        assert float(losses.ce) == pytest.approx(want, abs=0.05)
        assert float(losses.mtp_ce[0]) == pytest.approx(want, abs=0.05)


def test_loads_count_valid_tokens_k_times():
    config = small(depth=2, segment_mask=True)
    parts, batch = assemble(config), random_batch(config, documents=True)
    state = init_state(parts, 0)
    _, aux = evaluated(parts, state, batch)
    length, segment = config.data.length, batch.segment
    valid = [
        (
            (segment[:, :length] > 0)
            & (segment[:, :length] == segment[:, k : k + length])
        ).sum()
        for k in range(3)
    ]
    want = 2 * np.array([valid[0], valid[0], valid[1], valid[2]])
    np.testing.assert_array_equal(aux.load.sum(1), want)
    assert valid[0] > valid[1] > valid[2]


def test_counts_see_documents_and_padding():
    mark = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    np.testing.assert_array_equal(reaches(1, 4, mark), [[1, 0, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(reaches(2, 4, mark), [[0, 0, 1, 0], [1, 1, 1, 1]])
    totals_ = count([reaches(k, 4, mark) for k in range(3)])
    np.testing.assert_array_equal(totals_.tokens, [8, 7, 5])
    np.testing.assert_array_equal(count([jnp.zeros((2, 3), bool)]).rows, [0])


def hidden_states(config, rt, batch):
    parts = assemble(config)
    model = Transformer(config.model, rt, parts.balancer)
    with jax.enable_x64(True):
        state = as_f64(init_state(parts, 0))

        def loss(params):
            out = model.apply(
                {"params": params},
                batch.tokens[:, :-1],
                batch.position[:, : config.data.length],
                state.balance,
                segment_BS=batch.segment[:, :-1] if config.data.segment_mask else None,
                valid_BS=batch.segment[:, :-1] > 0,
            )
            valid = batch.segment[:, : config.data.length, None] > 0
            hidden = (out.hidden_BLD, *out.mtp_JBLD)
            return (
                sum((jnp.sin(3 * h) * valid).sum() for h in hidden)
                + out.aux.penalty.sum()
            )

        return jax.jit(jax.value_and_grad(loss))(state.params)


VARIANTS = {
    "mla": {},
    "no query compression": {"q_rank": 0},
    "mha": {"kind": "mha"},
    "gqa": {"kind": "gqa", "kv_heads": 2, "num_heads": 4},
    "fully rotated mha": {"kind": "mha", "nope_dim": 0},
}


@pytest.mark.parametrize(
    "variant, segment_mask, remat",
    [
        ("mla", False, "full"),
        ("mla", False, "none"),
        *((variant, True, "products") for variant in VARIANTS),
    ],
)
def test_every_runtime_agrees_with_the_plain_one(variant, segment_mask, remat):
    attention = dataclasses.replace(SMALL.attention, **VARIANTS[variant])
    config = small(
        batch=3,
        length=11,
        segment_mask=segment_mask,
        model=dataclasses.replace(SMALL, attention=attention),
    )
    batch = random_batch(config, documents=segment_mask)
    want = hidden_states(config, runtime.Runtime(), batch)
    rt = runtime.build(RuntimeConfig(block=4, remat=remat))
    got = hidden_states(config, rt, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=1e-10 * max(1e-3, np.abs(b).max())
        ),
        got,
        want,
    )


def test_gradient_reaches_every_parameter():
    config = small(depth=3)
    _, gradient = hidden_states(config, runtime.Runtime(), random_batch(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        if path[0].key != "head":  # the head is the objective's
            assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_asking_for_more_mtp_modules_than_there_are_is_refused():
    config = small(depth=1)
    parts = assemble(config)
    state = init_state(parts, 0)
    with pytest.raises(ValueError, match="ask for 3 MTP modules; the model has 1"):
        parts.model.apply(
            {"params": state.params},
            jnp.zeros((1, 8), jnp.int32),
            jnp.arange(5)[None],
            init_balance(parts),
        )


def test_balancer_may_be_swapped_for_inference():
    """A model trained with a bias serves with the same parameters and rule."""
    config = small()
    parts, batch = assemble(config), random_batch(config)
    state = init_state(parts, 0)
    plain = Transformer(config.model, runtime.Runtime(), balancing.loss_free(0.0))
    out = plain.apply(
        {"params": state.params},
        batch.tokens[:, : config.data.length],
        batch.position[:, : config.data.length],
        plain.balancer.init(8)[None].repeat(config.model.num_routers, 0),
    )
    logits = plain.apply({"params": state.params}, out.hidden_BLD, method="logits")
    assert logits.shape == (8, 12, 61) and not out.mtp_JBLD


def test_attention_defaults_are_deepseek_v3s():
    at = AttentionConfig()
    assert (at.num_heads, at.q_rank, at.kv_rank, at.nope_dim) == (128, 1536, 512, 128)
