"""Drafters for targets that are no plain Llama."""

import json

import jax
import numpy as np
import pytest

from dflash_jax.core import InputError, save_tensors
from dflash_jax.nn import SwiGLU, YarnScaling
from dflash_jax.targets import load_target, read_target_config, tensor_shapes
from dflash_jax.train.init import drafter_config, new_drafter

COMMON = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 18, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
GPT_OSS = COMMON | {
    "architectures": ["GptOssForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4,
    "rope_theta": 5000.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
QWEN3 = COMMON | {"architectures": ["Qwen3ForCausalLM"], "rope_theta": 5000.0}


def random_target(folder, config):
    """A target folder with weights of no meaning, read back."""
    (folder / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    shapes = tensor_shapes(read_target_config(folder))
    save_tensors(
        folder / "model.safetensors",
        {name: draw.normal(0.5, 0.3, shape).astype(np.float32) for name, shape in sorted(shapes.items())},
    )
    return load_target(folder)


def warm(target):
    shape = drafter_config(target, capture_layers=(1, 3), num_layers=2, block_size=4, mask_token_id=3)
    return shape, *(new_drafter(shape, target, init=init, key=jax.random.key(0)) for init in ("target", "random"))


@pytest.mark.slow
def test_a_drafter_for_gpt_oss_has_its_biases_and_its_rope_and_a_dense_mlp(tmp_path):
    target = random_target(tmp_path, GPT_OSS)
    shape, drafter, random = warm(target)
    assert (shape.attention_bias, shape.intermediate_size, shape.rope_theta) == (True, 64, 5000.0)
    assert shape.rope_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=16)
    for layer, cold, source in zip(drafter.layers, random.layers, (target.layers[0], target.layers[4]), strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            np.testing.assert_array_equal(getattr(layer.self_attn, name).bias, getattr(source.self_attn, name).bias)
        weight = source.self_attn.v_proj.weight * source.input_layernorm.weight[None]
        np.testing.assert_array_equal(layer.self_attn.v_proj.weight, weight)
        np.testing.assert_array_equal(layer.mlp.up_proj.weight, cold.mlp.up_proj.weight)
    assert jax.tree_util.tree_structure(drafter) == jax.tree_util.tree_structure(random)


@pytest.mark.slow
def test_a_drafter_for_qwen3_takes_its_head_norms(tmp_path):
    target = random_target(tmp_path, QWEN3)
    _, drafter, random = warm(target)
    for layer, source in zip(drafter.layers, (target.layers[0], target.layers[4]), strict=True):
        assert isinstance(source.mlp, SwiGLU)
        np.testing.assert_array_equal(layer.mlp.up_proj.weight, source.mlp.up_proj.weight)
        for name in ("q_norm", "k_norm"):
            ours, theirs = (getattr(side.self_attn, name).weight for side in (layer, source))
            np.testing.assert_array_equal(ours, theirs)
    assert jax.tree_util.tree_structure(drafter) == jax.tree_util.tree_structure(random)


def test_the_last_layer_is_refused_before_training(tmp_path):
    target = random_target(tmp_path, QWEN3)
    with pytest.raises(InputError, match="the drafter captures the target's last layer, 4: .* capture layers 0 to 3"):
        drafter_config(target, capture_layers=(1, 4), num_layers=1, block_size=4, mask_token_id=3)
