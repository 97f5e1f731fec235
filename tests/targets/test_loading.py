import json
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dflash_jax.core import InputError, load_tensors, save_tensors
from dflash_jax.targets import describe_target, fingerprint, load_target, read_target_config, tensor_shapes

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copies(checkpoints, tmp_path):
    """Folders that a test may spoil."""

    def copy(name):
        return shutil.copytree(checkpoints[name].folder, tmp_path / name)

    return copy


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_tensors(path, what="weights")
    change(tensors)
    save_tensors(path, tensors)


@pytest.mark.parametrize("name", ["grouped", "tied", "sharded"])
def test_every_tensor_of_the_checkpoint_is_called_for(checkpoints, name):
    checkpoint = checkpoints[name]
    written = {n: tuple(t.shape) for n, t in checkpoint.model.state_dict().items()}
    if name == "tied":
        assert written.pop("lm_head.weight") == written["model.embed_tokens.weight"]
    assert tensor_shapes(read_target_config(checkpoint.folder)) == written
    assert (len(list(checkpoint.folder.glob("*.safetensors"))) > 1) == (name == "sharded")


def test_missing_extra_and_misshaped_tensors_are_listed_at_once(copies):
    folder = copies("grouped")

    def spoil(tensors):
        del tensors["lm_head.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
        tensors["model.norm.weight"] = np.zeros(25, np.float32)

    change_weights(folder, spoil)
    for read in (load_target, describe_target):
        with pytest.raises(InputError) as raised:
            read(folder)
        assert str(raised.value) == (
            f"{folder}: 4 tensor(s) do not fit its config: missing lm_head.weight [101, 30]; "
            "missing model.layers.3.mlp.up_proj.weight [37, 30]; unexpected model.layers.1.self_attn.q_proj.bias [24]; "
            "model.norm.weight is [25], [30] is needed"
        )


def test_a_tied_head_may_be_stored_once_more(copies, checkpoints):
    folder = copies("tied")
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((101, 42), np.float32)}))
    target = load_target(folder)
    assert target.lm_head is None
    want = checkpoints["tied"].model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(target.head, want)


def test_quantised_weights_are_refused(copies):
    folder = copies("tied")
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(42, np.int8)}))
    with pytest.raises(InputError, match="model.norm.weight is I8; only BF16, F16, F32 and MXFP4 are handled"):
        load_target(folder)
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(42, np.uint8)}))
    with pytest.raises(InputError, match="1 tensor.s. are of another dtype: model.norm.weight is uint8, a float is"):
        load_target(folder)


def test_a_truncated_file(copies):
    folder = copies("grouped")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for read in (load_target, describe_target):
        with pytest.raises(InputError, match="the target's weights is truncated or damaged: .*model.safetensors"):
            read(folder)
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="the target's weights is not a safetensors file, or is truncated"):
        load_target(folder)


def test_a_header_whose_shapes_do_not_fit_its_bytes(copies):
    folder = copies("tied")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    # Half the numbers, declared as float16 of the same shape: the bytes of one tensor are then too many.
    spoilt = re.sub(rb'("model.norm.weight":\{"dtype":)"F32"', rb'\1"F16"', data)
    assert len(spoilt) == len(data)
    assert spoilt != data
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match="the target's weights are not readable: .*model.safetensors"):
        load_target(folder)


def test_folders_without_weights_and_indexes_that_are_none(copies):
    folder = copies("sharded")
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))

    def refuse(content, message):
        (folder / INDEX).write_text(json.dumps(content))
        for read in (load_target, describe_target, fingerprint):
            with pytest.raises(InputError, match=message):
                read(folder)

    refuse({"weight_map": index["weight_map"] | {first: "../other.safetensors"}}, r"outside the folder: \.\./other")
    refuse({"weight_map": index["weight_map"] | {first: "/etc/passwd"}}, "outside the folder: /etc/passwd")
    refuse(
        {"weight_map": index["weight_map"] | {first: "a.safetensors"}}, "names files that are not there: a.safetensors"
    )
    refuse({"metadata": {}}, "is not a weight index: it has no weight_map")
    refuse(["weight_map"], "is not a weight index")
    (folder / INDEX).unlink()
    with pytest.raises(
        InputError, match="is not a target folder: it has no model.safetensors and no model.safetensors.index"
    ):
        load_target(folder)


def test_weights_keep_their_values_in_either_dtype(checkpoints, copies):
    model = checkpoints["grouped"].model
    want = model.model.layers[2].self_attn.k_proj.weight.detach().numpy()
    target = load_target(checkpoints["grouped"].folder)
    np.testing.assert_array_equal(target.layers[2].self_attn.k_proj.weight, want)
    half = load_target(checkpoints["grouped"].folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in (half.embed_tokens, half.head, half.norm.weight)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(half.layers[2].self_attn.k_proj.weight, want.astype(ml_dtypes.bfloat16))
    # and a bfloat16 checkpoint, read as float32
    folder = copies("grouped")
    change_weights(
        folder, lambda tensors: tensors.update({n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()})
    )
    weight = load_target(folder).layers[2].self_attn.k_proj.weight
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(weight, want.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_description_counts_what_the_folder_holds(checkpoints):
    told = describe_target(checkpoints["grouped"].folder)
    assert told["num_parameters"] == sum(p.numel() for p in checkpoints["grouped"].model.parameters())
    assert told["weight_bytes"] == (checkpoints["grouped"].folder / "model.safetensors").stat().st_size
    assert told["kv_bytes_per_token"] == 256  # 2 (k, v) * 4 layers * 2 kv_heads * 4 channels * 4 bytes
    assert told["default_capture_layers"] == {"1": [2]}
    assert told["rope"] == "theta 5000 over 4 channels, unscaled; exact at any position below 2^31"
    assert (told["architecture"], told["num_heads"], told["tie_embeddings"]) == ("LlamaForCausalLM", 6, False)
    sharded = checkpoints["sharded"].folder
    assert describe_target(sharded)["weight_bytes"] == sum(f.stat().st_size for f in sharded.glob("*.safetensors"))


def test_a_fingerprint_is_of_content_not_of_place(copies, checkpoints):
    folder = copies("sharded")
    whole = fingerprint(checkpoints["sharded"].folder)
    assert whole.keys() == {"target_weights", "target_config"}
    assert fingerprint(folder) == whole
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert fingerprint(folder) == whole, "a field that does not reach the maths"
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    changed = fingerprint(folder)
    assert changed["target_config"] != whole["target_config"]
    assert changed["target_weights"] == whole["target_weights"]
    for path in sorted(folder.glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert fingerprint(folder)["target_weights"] != whole["target_weights"], path.name
        data[-1] ^= 1
        path.write_bytes(data)
