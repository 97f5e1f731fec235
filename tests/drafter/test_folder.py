"""Drafter folders: the public layout, both ways, and what bad folders are told."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dflash_jax.core import InputError, load_tensors, save_tensors
from dflash_jax.drafter import context_kv, drafter_fingerprint, load_drafter, read_drafter_config, save_drafter
from dflash_jax.nn import YarnScaling
from support import tiny

# the released Qwen3-8B-DFlash-b16 file, without what names code or the target's ids
PUBLIC_KEYS = [
    "architectures",
    "attention_bias",
    "attention_dropout",
    "block_size",
    "dflash_config",
    "dtype",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_target_layers",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
]


@pytest.fixture
def folder(tmp_path):
    save_drafter(tiny.random_drafter(tiny.tiny_drafter_config()), tmp_path)
    return tmp_path


def change_config(folder, **changes):
    """Change keys of config.json; None removes, `dflash_config` is merged."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dflash_config"] |= changes.pop("dflash_config", {})
    config = {key: value for key, value in (config | changes).items() if value != "remove"}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("attention_bias", [False, True])
def test_round_trip_is_bit_equal(tmp_path, attention_bias):
    drafter = tiny.random_drafter(tiny.tiny_drafter_config(attention_bias=attention_bias))
    save_drafter(drafter, tmp_path)
    again = load_drafter(tmp_path)
    assert again.config == drafter.config
    assert jax.tree_util.tree_structure(again) == jax.tree_util.tree_structure(drafter)
    for ours, theirs in zip(jax.tree_util.tree_leaves(again), jax.tree_util.tree_leaves(drafter), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_the_files_are_the_public_layout(tmp_path):
    save_drafter(tiny.random_drafter(tiny.tiny_drafter_config(attention_bias=True)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert sorted(config) == PUBLIC_KEYS
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {"mask_token_id": 3, "target_layer_ids": [1, 3]}
    assert (config["block_size"], config["rope_theta"], config["dtype"]) == (5, 7000.0, "float32")
    shapes = {n: t.shape for n, t in load_tensors(tmp_path / "model.safetensors", what="weights").items()}
    assert len(shapes) == 15 * 2 + 3
    assert shapes["fc.weight"] == (24, 48)
    assert shapes["hidden_norm.weight"] == shapes["norm.weight"] == (24,)
    layer = {n.removeprefix("layers.1."): shape for n, shape in shapes.items() if n.startswith("layers.1.")}
    assert layer == {
        "input_layernorm.weight": (24,),
        "post_attention_layernorm.weight": (24,),
        "self_attn.q_proj.weight": (60, 24),
        "self_attn.q_proj.bias": (60,),
        "self_attn.k_proj.weight": (30, 24),
        "self_attn.k_proj.bias": (30,),
        "self_attn.v_proj.weight": (30, 24),
        "self_attn.v_proj.bias": (30,),
        "self_attn.o_proj.weight": (24, 60),
        "self_attn.o_proj.bias": (24,),
        "self_attn.q_norm.weight": (10,),
        "self_attn.k_norm.weight": (10,),
        "mlp.gate_proj.weight": (29, 24),
        "mlp.up_proj.weight": (29, 24),
        "mlp.down_proj.weight": (24, 29),
    }


def test_without_biases_there_are_11_tensors_a_layer_and_3(folder):
    assert len(load_tensors(folder / "model.safetensors", what="weights")) == 11 * 2 + 3


def test_bfloat16_stays_bfloat16_on_disk_and_loads_as_asked(tmp_path):
    drafter = jax.tree_util.tree_map(
        lambda leaf: leaf.astype(jnp.bfloat16), tiny.random_drafter(tiny.tiny_drafter_config())
    )
    save_drafter(drafter, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_tensors(tmp_path / "model.safetensors", what="weights")["fc.weight"].dtype == ml_dtypes.bfloat16
    assert load_drafter(tmp_path).fc.weight.dtype == jnp.float32
    np.testing.assert_array_equal(load_drafter(tmp_path, dtype=jnp.bfloat16).fc.weight, drafter.fc.weight)


YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def test_the_published_gpt_oss_drafters_rope_is_read_and_written(folder):
    drafter = tiny.random_drafter(
        tiny.tiny_drafter_config(
            rope_scaling=YarnScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False)
        )
    )
    save_drafter(drafter, folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_scaling"] == YARN | {"beta_fast": 32.0, "beta_slow": 1.0}
    assert written["rope_theta"] == 7000.0
    assert load_drafter(folder).config == drafter.config
    assert drafter.config.rope.attention_factor == pytest.approx(1.3466, abs=1e-4)  # spec, section 5.3
    # as transformers 5 would write it
    change_config(folder, rope_scaling="remove", rope_parameters=YARN | {"rope_theta": 7000.0})
    assert read_drafter_config(folder).rope == drafter.config.rope


def test_a_scaled_rope_turns_the_drafters_queries_and_keys():
    plain = tiny.random_drafter(tiny.tiny_drafter_config())
    config = tiny.tiny_drafter_config(
        rope_scaling=YarnScaling(factor=32.0, original_max_position_embeddings=64, truncate=False)
    )
    scaled = dataclasses.replace(plain, config=config)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(3, 48)), jnp.float32)
    positions = jnp.array([0, 1, 50], jnp.int32)
    near, far = (context_kv(drafter, features, positions)[0] for drafter in (plain, scaled))
    np.testing.assert_array_equal(near.v, far.v)
    # position 0 turns nothing: there the keys only grow by the attention factor
    np.testing.assert_allclose(far.k[:, 0], near.k[:, 0] * np.float32(config.rope.attention_factor), rtol=1e-6)
    assert not np.allclose(far.k[:, 2], near.k[:, 2] * np.float32(config.rope.attention_factor), rtol=0.01)


def test_newer_layouts_are_read(folder):
    config = read_drafter_config(folder)
    change_config(
        folder,
        block_size="remove",
        rope_theta="remove",
        rope_parameters={"rope_type": "default", "rope_theta": 7000.0},
        dflash_config={"block_size": 5},
        auto_map={"AutoModel": "dflash.DFlashDraftModel"},
        transformers_version="5.0",
    )
    assert read_drafter_config(folder) == config


def test_the_fingerprint_is_of_the_weights(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_drafter(tiny.random_drafter(tiny.tiny_drafter_config(), seed=2), other)
    again = tmp_path_factory.mktemp("again")
    save_drafter(load_drafter(folder), again)
    assert drafter_fingerprint(again) == drafter_fingerprint(folder) != drafter_fingerprint(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures is \['LlamaForCausalLM'\], a DFlash drafter has"),
        ({"architectures": "remove"}, r"config\.json: architectures is None"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, r"not handled: layer_types has 'chunked_attention'"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"sliding_window is None and use_sliding_window False: a window of at least 1 and true are needed",
        ),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9},
            r"sliding_window is 9 and use_sliding_window False",
        ),
        ({"sliding_window": 9, "use_sliding_window": True}, "sliding_window is 9, and layer_types names no layer"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 layers of 2"),
        ({"is_causal": True, "dflash_config": {"causal": False}}, "one of true and false is needed"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 32.0}},
            r"rope_scaling\.original_max_position_embeddings is missing",
        ),
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 9.0}}, r"rope_parameters\.rope_type is 'ntk'; handled"),
        ({"hidden_act": "gelu", "logit_scale": 7}, r"hidden_act is 'gelu'; logit_scale is 7$"),
        ({"dflash_config": {"use_swa": True}}, r"dflash_config\.use_swa is True"),
        ({"dflash_config": {"output_multiplier": 0.5}}, r"dflash_config\.output_multiplier is 0\.5"),
        ({"final_logit_softcapping": 30.0}, r"not handled: final_logit_softcapping is 30\.0"),
        ({"hidden_size": "remove"}, r"config\.json: hidden_size is missing"),
        ({"block_size": "remove"}, r"config\.json: block_size is missing"),
        ({"dflash_config": {"mask_token_id": None}}, r"config\.json: a size or an id is no number"),
        ({"vocab_size": "many"}, r"config\.json: a size or an id is no number.*'many'"),
        ({"dflash_config": {"mask_token_id": 53}}, r"mask_token_id 53 is outside the vocabulary of 53"),
        ({"dflash_config": {"target_layer_ids": [1, 5]}}, r"target_layer_ids \[1, 5\] are not layers of a target of 5"),
        (
            {"dflash_config": {"target_layer_ids": [1, 4]}},
            r"captures the target's last layer, 4: other engines take that one after the target's final norm and would "
            r"not agree; capture layers 0 to 3",
        ),
        ({"num_key_value_heads": 4}, r"num_attention_heads 6 is no multiple of num_key_value_heads 4"),
        ({"block_size": 1}, r"block_size is 1, at least 2 are needed"),
    ],
)
def test_a_config_that_cannot_be_used_is_told_apart(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        read_drafter_config(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_are_no_drafter(folder, tmp_path):
    with pytest.raises(InputError, match="no drafter folder at .*/nowhere"):
        load_drafter(tmp_path / "nowhere")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="architectures is None"):
        load_drafter(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="the drafter's config is missing: .*config.json"):
        load_drafter(folder)


def test_weights_that_do_not_fit_are_all_named_at_once(folder):
    weights = load_tensors(folder / "model.safetensors", what="weights")
    weights["layers.0.self_attn.q_proj.bias"] = np.zeros(60, np.float32)
    weights["fc.weight"] = np.zeros((24, 24), np.float32)
    del weights["norm.weight"], weights["layers.1.mlp.up_proj.weight"]
    save_tensors(folder / "model.safetensors", weights)
    with pytest.raises(InputError) as error:
        load_drafter(folder)
    assert str(error.value) == (
        f"{folder}: 4 tensor(s) do not fit its config: missing layers.1.mlp.up_proj.weight [29, 24]; missing "
        "norm.weight [24]; unexpected layers.0.self_attn.q_proj.bias [60]; fc.weight is [24, 24], [24, 48] is needed"
    )


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="the drafter's weights is truncated or damaged"):
        load_drafter(folder)


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        (
            {"sliding_window": 7, "sliding_layers": (1,)},
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "sliding_window": 7,
                "use_sliding_window": True,
                "is_causal": None,
            },
        ),
        ({"is_causal": False}, {"is_causal": False, "use_sliding_window": False, "sliding_window": None}),
    ],
)
def test_sliding_layers_are_written_as_every_reader_looks_for_them(tmp_path, changes, written):
    config = tiny.tiny_drafter_config(**changes)
    save_drafter(tiny.random_drafter(config), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert {name: raw.get(name) for name in written} == written
    assert read_drafter_config(tmp_path) == config


def test_a_window_that_is_not_used_is_none(folder):
    change_config(folder, sliding_window=4096, use_sliding_window=False)
    assert read_drafter_config(folder).sliding_window is None
