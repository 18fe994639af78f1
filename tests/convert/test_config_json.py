"""config.json in both directions, and what it must not ask for."""

import dataclasses
import json

import pytest

from deepseek_jax import presets
from deepseek_jax.config import MoEConfig, MTPConfig, RopeConfig
from deepseek_jax.convert import config_json
from tests.convert import released
from tests.factory import SMALL

V3_RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE = {
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "rope_theta": 10000,
        "rope_type": "yarn",
    },
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


V2_MOE = MoEConfig(score="softmax", group_score="max", normalize=False)


def test_released_configs_are_the_presets():
    assert config_json.read(V3_RELEASED).model == presets.v3_671b()
    assert config_json.read(V2_LITE).model == presets.v2_lite_16b()


@pytest.mark.parametrize(
    "model",
    [
        presets.v3_671b(),
        presets.v2_236b(),
        presets.v2_lite_16b(),
        presets.ablation_16b(),
        presets.ablation_229b(),
        presets.tiny(),
        dataclasses.replace(SMALL, mtp=MTPConfig(2), num_dense=0),
    ],
    ids=lambda model: str(model.dim),
)
def test_what_is_written_reads_as_the_same_model(model):
    kind = config_json.family_of(model, model.moe.score == "sigmoid")
    written = json.loads(json.dumps(config_json.write(model, kind)))
    again = config_json.read(written).model
    assert dataclasses.replace(again, init_std=model.init_std) == model


def test_a_v3_config_is_written_as_it_was_released():
    written = config_json.write(presets.v3_671b(), "deepseek_v3")
    ours = {"initializer_range": 0.006}  # the report's, not the file's
    extra = {"rope_interleave", "mlp_bias"}
    want = {n: v for n, v in (V3_RELEASED | ours).items() if n in written}
    assert {n: v for n, v in written.items() if n not in extra} == want
    unknown = {"attention_dropout", "aux_loss_alpha", "bos_token_id", "eos_token_id"}
    unknown |= {"ep_size", "pretraining_tp", "seq_aux", "torch_dtype"}
    assert V3_RELEASED.keys() - written.keys() == unknown


def change(config, **fields):
    return config | fields


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change(V3_RELEASED, model_type="llama"), r"model_type = 'llama'"),
        (change(V3_RELEASED, hidden_act="gelu"), r"hidden_act = 'gelu'"),
        (change(V3_RELEASED, attention_bias=True), r"attention_bias = True"),
        (change(V3_RELEASED, tie_word_embeddings=True), "tie_word_embeddings"),
        (change(V3_RELEASED, moe_layer_freq=2), "moe_layer_freq = 2"),
        (change(V3_RELEASED, rope_interleave=False), "rope_interleave = False"),
        (change(V3_RELEASED, rms_norm_eps=1e-5), "rms_norm_eps"),
        (change(V3_RELEASED, num_key_value_heads=8), "num_key_value_heads = 8"),
        (change(V3_RELEASED, scoring_func="softmax"), "scoring_func = 'softmax'"),
        (change(V3_RELEASED, topk_method="greedy"), "topk_method = 'greedy'"),
        (change(V2_LITE, norm_topk_prob=True), "norm_topk_prob = True"),
        (change(V3_RELEASED, num_nextn_predict_layers=5), "nextn_predict_layers = 5"),
        (change(V3_RELEASED, num_nextn_predict_layers="1"), "layers = '1'"),
        (change(V3_RELEASED, num_nextn_predict_layers=1.0), "layers = 1.0: .* integer"),
        (change(V3_RELEASED, q_lora_rank="1"), "q_lora_rank = '1'"),
        (change(V3_RELEASED, n_shared_experts="1"), "n_shared_experts = '1'"),
        (change(V3_RELEASED, routed_scaling_factor=None), "scaling_factor = None"),
        (change(V3_RELEASED, routed_scaling_factor=True), "scaling_factor = True"),
        (change(V3_RELEASED, norm_topk_prob=1), "norm_topk_prob = 1 "),
        (change(V3_RELEASED, model_type=["deepseek_v3"]), r"model_type = \['deepseek"),
        (change(V3_RELEASED, rope_theta="x"), "rope_theta = 'x'"),
        (change(V3_RELEASED, rope_theta=0), "rope_theta = 0.0: must be positive"),
        (change(V3_RELEASED, rope_scaling="yarn"), "rope_scaling = 'yarn'"),
        (
            change(V3_RELEASED, n_group=7),
            "json: n_group = 7: must divide n_routed_experts = 256",
        ),
        (change(V3_RELEASED, n_group=None), "n_group = None"),
        (change(V3_RELEASED, n_group=256), "n_group = 256 .* 2 experts or more"),
        (
            change(V3_RELEASED, topk_group=9),
            "topk_group = 9: must be at most n_group = 8",
        ),
        (
            change(V2_LITE, topk_method="group_limited_greedy", n_group=None),
            "n_group = None",
        ),
        (change(V3_RELEASED, index_topk=2048), "index_topk = 2048 is not supported"),
        (change(V3_RELEASED, sliding_window=128), "sliding_window = 128"),
        (change(V3_RELEASED, swiglu_limit=7.0), "swiglu_limit = 7.0"),
        (
            change(V3_RELEASED, hiden_size=7168),
            "hiden_size = 7168 .*; did you mean 'hidden_size'",
        ),
        (change(V3_RELEASED, hidden_size="wide"), "hidden_size = 'wide'"),
        (
            {n: v for n, v in V3_RELEASED.items() if n != "kv_lora_rank"},
            "kv_lora_rank = None",
        ),
        (
            change(V3_RELEASED, rope_scaling={"type": "linear", "factor": 2}),
            r"rope_scaling\.type = 'linear'",
        ),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        config_json.read(config)


@pytest.mark.parametrize(
    "name",
    [
        "q_lora_rank",
        "n_shared_experts",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "norm_topk_prob",
    ],
)
def test_what_config_classes_have_other_defaults_for_must_be_there(name):
    config = {n: v for n, v in V3_RELEASED.items() if n != name}
    with pytest.raises(ValueError, match=f"config.json: {name} is missing"):
        config_json.read(config)


def test_fields_of_training_and_of_other_programs_change_nothing():
    harmless = dict.fromkeys(config_json.HARMLESS, "whatever")
    off = {"sliding_window": None, "index_topk": None}
    assert config_json.read(V3_RELEASED | harmless | off).model == presets.v3_671b()


YARN = V3_RELEASED["rope_scaling"]
UNTYPED = {n: v for n, v in YARN.items() if n != "type"}
MODERN = UNTYPED | {"rope_type": "yarn", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": UNTYPED}, r"rope_scaling\.rope_type = None .*'yarn'"),
        (
            {"rope_scaling": UNTYPED | {"type": "default"}},
            r"rope_scaling\.type = 'default' .* with factor it must be 'yarn'",
        ),
        (
            {"rope_scaling": YARN | {"rope_type": "default"}},
            r"rope_scaling\.type = 'yarn' .* rope_type is 'default'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            "rope_scaling and rope_parameters contradict each other",
        ),
        (
            {"rope_parameters": MODERN | {"beta_slow": 2}},
            "rope_scaling and rope_parameters contradict each other",
        ),
        (
            {"rope_parameters": MODERN | {"rope_theta": 5e5}},
            r"rope_theta = 10000.0, rope_parameters.rope_theta = 500000.0 contradict",
        ),
        (
            {"rope_scaling": YARN | {"long_factor": [1.0]}},
            r"rope_scaling\.long_factor = \[1.0\]",
        ),
        ({"rope_scaling": YARN | {"factor": 0.5}}, r"rope_scaling\.factor = 0.5: must"),
        ({"rope_scaling": YARN | {"factor": "40"}}, r"rope_scaling\.factor = '40'"),
        ({"rope_scaling": YARN | {"beta_fast": [32]}}, r"rope_scaling\.beta_fast"),
    ],
)
def test_contradictory_rotary_settings_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        config_json.read(V3_RELEASED | fields)


def test_two_rotary_blocks_may_say_the_same():
    both = V3_RELEASED | {"rope_parameters": MODERN}
    assert config_json.read(both).model == presets.v3_671b()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_factor": 0.5}, "attention_factor = 0.5"),
        ({"truncate": False}, "truncate = False"),
        ({"factor": None}, "factor = None"),
        ({"mscale": 0}, "mscale_all_dim = 1.0"),
        ({"mscale": 0.7, "mscale_all_dim": None}, "mscale = 0.7"),
    ],
)
def test_other_yarns_are_refused_by_name(fields, message):
    scaling = V3_RELEASED["rope_scaling"] | fields
    with pytest.raises(ValueError, match=rf"rope_scaling\.{message}"):
        config_json.read(V3_RELEASED | {"rope_scaling": scaling})


def test_yarn_without_mscales_leaves_the_softmax_alone():
    scaling = {
        n: v for n, v in V3_RELEASED["rope_scaling"].items() if "mscale" not in n
    }
    config = V3_RELEASED | {"rope_scaling": scaling}
    rope = config_json.read(config).model.attention.rope
    assert rope == RopeConfig(factor=40.0, mscale=1.0, mscale_all_dim=0.0)
    written = config_json.write(config_json.read(config).model, "deepseek_v3")
    assert config_json.read(written).model.attention.rope == rope


@pytest.mark.parametrize(
    ("changes", "bias", "message"),
    [
        (
            {"attention": dataclasses.replace(SMALL.attention, kind="mha")},
            True,
            r"attention\.kind = 'mha'",
        ),
        ({"moe": MoEConfig(group_score="max")}, True, r"moe\.group_score = 'max'"),
        (
            {"moe": MoEConfig(score="softmax", group_score="max")},
            False,
            r"moe\.normalize = True",
        ),
        (
            {"moe": MoEConfig(score="softmax", group_score="max", normalize=False)},
            True,
            r"moe\.score = 'softmax'",
        ),
        (
            {"moe": dataclasses.replace(SMALL.moe, num_shared=0)},
            True,
            r"moe\.num_shared = 0 .* at least 1",
        ),
        (
            {"moe": MoEConfig(num_groups=256, keep_groups=256, group_score="max")},
            True,
            r"moe\.num_groups = 256 .* 2 experts or more",
        ),
        ({"moe": V2_MOE, "mtp": MTPConfig(1)}, False, r"mtp\.depth = 1 .* 0"),
        (
            {"moe": V2_MOE, "mtp": MTPConfig(0), "dim": 15},
            False,
            r"model\.dim = 15 .* a multiple of attention\.num_heads = 2",
        ),
        ({"norm_eps": 1e-5}, True, r"norm_eps = 1e-05"),
        ({"mtp": MTPConfig(1, input_norm=False)}, True, r"mtp\.input_norm = False"),
    ],
)
def test_models_without_a_counterpart_are_refused_by_name(changes, bias, message):
    with pytest.raises(ValueError, match=message):
        config_json.family_of(dataclasses.replace(SMALL, **changes), bias)


@pytest.mark.parametrize("name", [p.name for p in sorted(released.FIXTURES.iterdir())])
def test_transformers_configs_are_read(name):
    config, _ = released.fixture(name)
    assert "rope_parameters" in config
    model = config_json.read(config).model
    assert model.attention.rope.factor == (40 if name in ("v3_yarn", "v2_lite") else 1)
