import json
import math

import pytest

from dflash_jax.core import InputError
from dflash_jax.nn import Llama3Scaling, Rope, YarnScaling
from dflash_jax.targets import (
    TargetConfig,
    default_capture_layers,
    read_target_config,
    stored_shapes,
    tensor_shapes,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000,
    "max_position_embeddings": 97,
}


def read(folder, **changes):
    """Changes of LLAMA; a field that becomes ... is left out."""
    raw = {name: value for name, value in (LLAMA | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return read_target_config(folder)


def test_a_config_by_hand(tmp_path):
    config = read(
        tmp_path, head_dim=8, tie_word_embeddings=True, hidden_act="silu", rope_scaling=None, attention_bias=False
    )
    assert config == TargetConfig(
        architecture="LlamaForCausalLM", vocab_size=101, hidden_size=24, intermediate_size=37, num_layers=5,
        num_heads=6, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_theta=5000.0, max_positions=97,
        tie_embeddings=True,
    )  # fmt: skip
    assert config.rope == Rope(theta=5000.0, head_dim=8)


def test_fields_that_checkpoints_leave_out(tmp_path):
    config = read(tmp_path, num_key_value_heads=...)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (6, 4, False)
    assert read(tmp_path, head_dim=None).head_dim == 4
    # as Llama 2's do; transformers' default
    assert read(tmp_path, rope_theta=...).rope_theta == 10000.0


def test_rope_theta_of_transformers_5(tmp_path):
    assert read(tmp_path, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 7e5}).rope_theta == 7e5
    assert read(tmp_path, rope_parameters={"rope_theta": 7e5}).rope_theta == 7e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            "architecture MistralForCausalLM is not handled; handled: LlamaForCausalLM, Qwen3ForCausalLM, GptOss",
        ),
        ({"architectures": ...}, r"architecture \(none\) is not handled"),
        (
            {"hidden_act": "gelu", "residual_multiplier": 0.5, "sliding_window": 128},
            "not handled: hidden_act is 'gelu'; residual_multiplier is 0.5; sliding_window is 128",
        ),
        ({"layer_types": ["full_attention"] * 4 + ["chunked"]}, "not handled: layer_types has 'chunked'"),
        (
            {"attention_chunk_size": 8192, "clip_qkv": 8.0, "logits_scaling": 16, "qk_layernorm": True},
            "not handled: attention_chunk_size is 8192; clip_qkv is 8.0; logits_scaling is 16; qk_layernorm is True",
        ),
        ({"layer_types": ["full_attention"] * 4}, r"layer_types is \['full.*\], a list of 5 is needed"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', true or false is needed"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling.rope_type is 'linear'; handled: default, llama3, yarn",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type is 'dynamic'; handled: default, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "factor": 4.0}},
            "rope_parameters.rope_type is 'longrope'; handled: default, llama3, yarn",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "not handled: quantization_config is {'bits': 4}"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            "rope_parameters.high_freq_factor is missing; rope_parameters.low_freq_factor is missing",
        ),
        ({"rope_parameters": {"type": "yarn"}}, "rope_parameters.factor is missing"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0, a number above 1 is needed"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', a positive number is needed"),
        ({"num_attention_heads": ...}, "num_attention_heads is missing"),
        (
            {
                "hidden_size": ...,
                "num_hidden_layers": 0,
                "vocab_size": 1.5,
                "intermediate_size": True,
                "rms_norm_eps": ...,
            },
            "vocab_size is 1.5, a positive whole number is needed; intermediate_size is True, .*; hidden_size is "
            "missing; num_hidden_layers is 0, .*; rms_norm_eps is missing",
        ),
        ({"head_dim": 5}, r"head_dim is 5, an even number is needed \(rotary pairs\)"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4 key and value heads"),
    ],
)
def test_what_is_not_handled_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"config.json: {message}") as raised:
        read(tmp_path, **changes)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 4096, "use_sliding_window": False}
# gpt-oss-20b's own config.json, as OpenAI published it (transformers 4)
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip


def read_as(folder, base, **changes):
    return read(folder, **{name: ... for name in LLAMA if name not in base} | base | changes)


def test_gpt_oss_20b(tmp_path):
    config = read_as(tmp_path, GPT_OSS)
    assert config == TargetConfig(
        architecture="GptOssForCausalLM", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_layers=24,
        num_heads=64, num_kv_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=150000.0, max_positions=131072,
        tie_embeddings=False, attention_bias=True, norm_cast_last=True, attention_sinks=True, sliding_window=128,
        sliding_layers=tuple(range(0, 24, 2)), num_experts=32, experts_per_token=4, swiglu_alpha=1.702,
        swiglu_limit=7.0, mxfp4=True,
        rope_scaling=YarnScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False),
    )  # fmt: skip
    # what transformers makes of a config that is silent
    silent = dict.fromkeys(("layer_types", "head_dim", "attention_bias", "swiglu_limit", "rope_theta"), ...)
    silent = read_as(tmp_path, GPT_OSS, **silent)
    assert silent == config
    assert not read_as(tmp_path, GPT_OSS, quantization_config=None).mxfp4
    shapes, stored = tensor_shapes(config), stored_shapes(config)
    assert shapes["model.layers.3.mlp.experts.down_proj"] == (32, 2880, 2880)
    assert stored["model.layers.3.mlp.experts.gate_up_proj_blocks"] == (32, 5760, 90, 16)
    assert stored["model.layers.3.mlp.experts.down_proj_scales"] == (32, 2880, 90)
    assert sum(math.prod(shape) for shape in shapes.values()) == 20_914_757_184  # its model card: 20.9B
    assert stored.keys() - shapes.keys() == {
        f"model.layers.{i}.mlp.experts.{name}_{part}"
        for i in range(24) for name in ("gate_up_proj", "down_proj") for part in ("blocks", "scales")
    }  # fmt: skip


def test_qwen3(tmp_path):
    config = read_as(tmp_path, QWEN3)
    assert (config.qk_norm, config.head_dim, config.sliding_layers, config.sliding_window) == (True, 128, (), None)
    slides = read_as(tmp_path, QWEN3, use_sliding_window=True, max_window_layers=3)
    assert (slides.sliding_layers, slides.sliding_window) == ((3, 4), 4096)
    kinds = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    assert read_as(tmp_path, QWEN3, layer_types=kinds, use_sliding_window=True).sliding_layers == (1, 3)
    # transformers leaves the window out then, and its mask fails
    with pytest.raises(InputError, match="layer_types has 'sliding_attention' and use_sliding_window is not true"):
        read_as(tmp_path, QWEN3, layer_types=kinds)
    assert read_as(tmp_path, QWEN3, attention_bias=True).attention_bias


def test_llama_3_with_biases(tmp_path):
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    config = read(
        tmp_path, attention_bias=True, mlp_bias=True, rope_scaling=scaling | {"original_max_position_embeddings": 8192}
    )
    assert (config.attention_bias, config.mlp_bias) == (True, True)
    assert config.rope_scaling == Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def test_the_rope_setting_is_ours(tmp_path):
    read(tmp_path)
    config = read_target_config(tmp_path, rope="table:4096")
    assert config.rope == Rope(theta=5000.0, head_dim=4, precision="table:4096")
    with pytest.raises(InputError, match="the rope setting is 'table:0': choose exact, float32, bfloat16 or table:N"):
        read_target_config(tmp_path, rope="table:0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "not handled: quantization_config is {'quant_method': 'gptq'}",
        ),
        ({"mlp_bias": True}, "not handled: mlp_bias is True"),
        ({"num_experts_per_tok": 33, "experts_per_token": ...}, "num_experts_per_tok is 33, there are 32 experts"),
        ({"experts_per_token": 2}, "experts_per_token 2 is not num_experts_per_tok 4"),
        (
            {"num_local_experts": ..., "swiglu_limit": -1},
            "num_local_experts is missing; swiglu_limit is -1, a positive",
        ),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"intermediate_size": 2881}, "intermediate_size 2881 is no multiple of 32: no MXFP4 groups"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', a list of 24 is needed"),
    ],
)
def test_what_gpt_oss_does_not_allow_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"config.json: {message}"):
        read_as(tmp_path, GPT_OSS, **changes)


def test_folders_that_are_no_targets(tmp_path):
    with pytest.raises(InputError, match="no target folder at .*absent: make one with `dflash-jax target import"):
        read_target_config(tmp_path / "absent")
    with pytest.raises(InputError, match="the target's config is missing: .*config.json"):
        read_target_config(tmp_path)
    (tmp_path / "config.json").write_text('["LlamaForCausalLM"]')
    with pytest.raises(InputError, match="the target's config is a JSON list, an object is needed: .*config.json"):
        read_target_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures"')
    with pytest.raises(InputError, match="the target's config is not JSON: .*config.json"):
        read_target_config(tmp_path)


# shared/reference/dflash-spec.md, section 2, and by hand for 30 layers: 1 + i * 26 / (count - 1), half to even
@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [
        (36, (1, 9, 17, 25, 33)),
        (24, (1, 6, 11, 16, 21)),
        (64, (1, 16, 31, 46, 61)),
        (32, (16,)),
        (32, (1, 15, 29)),
        (32, (1, 10, 20, 29)),
        (40, (1, 10, 19, 28, 37)),
        (28, (1, 7, 13, 19, 25)),
        (16, (1, 4, 7, 10, 13)),
        (30, (1, 10, 18, 27)),
        (30, (1, 8, 14, 20, 27)),
        (5, (1, 2)),
        (4, (2,)),
    ],
)
def test_default_capture_layers(num_layers, layers):
    assert default_capture_layers(num_layers, len(layers)) == layers


@pytest.mark.parametrize(("num_layers", "count"), [(30, 28), (30, 0), (3, 1), (4, 2)])
def test_layers_that_cannot_be_spread(num_layers, count):
    with pytest.raises(
        InputError, match=f"{count} capture layers cannot be spread over a target of {num_layers} layers"
    ):
        default_capture_layers(num_layers, count)
