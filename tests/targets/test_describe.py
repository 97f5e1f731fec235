import json

import pytest

from dflash_jax.core import InputError, MeshShape
from dflash_jax.targets import describe_target

# openai/gpt-oss-20b's published config.json
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "attention_bias": True, "hidden_act": "silu", "swiglu_limit": 7.0,
    "rope_theta": 150000, "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B))
    return tmp_path


def test_a_config_alone_will_do(folder):
    told = describe_target(folder)
    assert (told["family"], told["num_layers"], told["num_experts"]) == ("GptOss", 24, 32)
    assert told["num_parameters"] == 20_914_757_184  # as its model card says: 21B
    assert told["num_active_parameters"] == 4_187_440_704  # 3.6B, and the embedding that the card leaves out: 0.58B
    assert told["weight_bytes"] is None
    assert told["kv_bytes_per_token"] == 2 * 24 * 8 * 64 * 4
    layers = told["default_capture_layers"]
    assert (layers["1"], layers["4"], layers["5"]) == ([12], [1, 8, 14, 21], [1, 6, 11, 16, 21])
    assert told["rope"] == (
        "theta 150000 over 64 channels, yarn scaling by 32 from a context of 4096 tokens, cosines and sines times "
        "1.347; exact at any position below 2^31"
    )
    assert (told["mesh"], told["num_devices"], told["whole_axes"]) == ("data=1", 1, [])
    memory = told["memory"]["bfloat16"]
    assert memory == {
        "weight_bytes": 2 * 20_914_757_184,
        "weight_bytes_per_device": 2 * 20_914_757_184,
        "kv_bytes_per_token": 49_152,
        "kv_bytes_per_token_per_device": 49_152,
        "features_bytes_per_token_per_layer": 5_760,
    }
    assert told["memory"]["float32"] == {name: 2 * size for name, size in memory.items()}


def test_memory_for_a_mesh(folder):
    whole = describe_target(folder)
    told = describe_target(folder, mesh=MeshShape(data=2, expert=4, model=2))
    assert (told["mesh"], told["num_devices"], told["whole_axes"]) == ("data=2,expert=4,model=2", 16, [])
    memory, before = told["memory"]["bfloat16"], whole["memory"]["bfloat16"]
    assert memory["kv_bytes_per_token_per_device"] * 2 == before["kv_bytes_per_token"]
    # by hand: experts over 8, other matrices over 2, routers over 4; norms and biases of o_proj whole
    experts = 32 * (2880 * 5760 + 5760 + 2880 * 2880) // 8 + 32 * 2880 // 4
    attention = (4096 * 2880 * 2 + 512 * 2880 * 2 + 4096 + 512 * 2 + 64) // 2 + 2880
    router, norms = 32 * 2881 // 4, 2 * 2880
    per_device = 24 * (experts + attention + router + norms) + 2 * 201088 * 2880 // 2 + 2880
    assert memory["weight_bytes_per_device"] == 2 * per_device
    assert memory["weight_bytes"] == before["weight_bytes"]


def test_what_a_mesh_cannot_split_is_listed(folder):
    assert describe_target(folder, mesh=MeshShape(model=16))["whole_axes"] == [
        "kv_heads: 8 do not divide by model=16, every device holds all of them"
    ]
    dense = {name: value for name, value in GPT_OSS_20B.items() if name not in ("sliding_window", "layer_types")}
    (folder / "config.json").write_text(json.dumps(dense | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InputError, match="--mesh expert=2: the target has no experts to split"):
        describe_target(folder, mesh=MeshShape(expert=2))
