import json

import pytest

from dflash_jax.core import InputError
from dflash_jax.nn import Rope
from dflash_jax.targets import TargetConfig, default_capture_layers, read_target_config

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


def test_rope_theta_of_transformers_5(tmp_path):
    assert read(tmp_path, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 7e5}).rope_theta == 7e5
    assert read(tmp_path, rope_parameters={"rope_theta": 7e5}).rope_theta == 7e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GptOssForCausalLM"]},
            "architecture GptOssForCausalLM is not handled; handled: LlamaForCausalLM",
        ),
        ({"architectures": ...}, r"architecture \(none\) is not handled"),
        (
            {"hidden_act": "gelu", "attention_bias": True, "sliding_window": 128},
            "not handled: hidden_act is 'gelu'; attention_bias is True; sliding_window is 128",
        ),
        ({"mlp_bias": True}, "not handled: mlp_bias is True"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling.rope_type is 'linear'; handled: default, llama3, yarn",
        ),
        ({"quantization_config": {"bits": 4}}, "not handled: quantization_config is {'bits': 4}"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            "rope_parameters.high_freq_factor is missing; rope_parameters.low_freq_factor is missing",
        ),
        ({"rope_parameters": {"type": "yarn"}}, "rope_parameters.factor is missing"),
        ({"rope_theta": ...}, "rope_theta is missing"),
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
            "vocab_size is 1.5, a positive whole number is needed; hidden_size is missing; intermediate_size is True, "
            ".*; num_hidden_layers is 0, .*; rms_norm_eps is missing",
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
