import json

import pytest

from dflash_jax.targets import num_active_parameters, prefill_flops, read_target_config
from dflash_jax.targets.cost import visible_pairs

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 6, "intermediate_size": 5,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "architectures": ["GptOssForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def read(folder, **changes):
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return read_target_config(folder)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 9])
def test_pairs_are_those_of_the_mask(length, window):
    mask = [(q, k) for q in range(length) for k in range(length) if k <= q and (window is None or k > q - window)]
    assert visible_pairs(length, window) == len(mask)


def test_flops_by_hand(tmp_path):
    # a layer: q 6x8, k and v 6x4 each, o 8x6, gate, up and down 6x5 each; then the head 11x6
    matrices = 2 * (48 + 24 + 24 + 48 + 3 * 30) + 66
    norms = 2 * 2 * 6 + 6
    attention = 2 * (2 * 2 * 2 * 4) * (1 + 2 + 3)  # layers, products of 2 heads of 4 channels, pairs
    for tied in (True, False):
        config = read(tmp_path, tie_word_embeddings=tied)
        assert num_active_parameters(config) == matrices + norms + (0 if tied else 66)
        assert prefill_flops(config, batch=5, length=3) == 5 * (2 * (matrices + norms) * 3 + attention)


def test_idle_experts_cost_nothing(tmp_path):
    config = read(tmp_path, **EXPERTS, tie_word_embeddings=True)
    more = read(tmp_path, **EXPERTS | {"num_local_experts": 9}, tie_word_embeddings=True)
    assert num_active_parameters(more) - num_active_parameters(config) == 2 * 6 * (6 + 1)  # routers' rows and biases
    attention = 2 * 2 * 2 * 4 * ((1 + 2 + 2) + (1 + 2 + 3))  # a window of 2, then none
    assert prefill_flops(config, batch=1, length=3) == 2 * num_active_parameters(config) * 3 + attention
