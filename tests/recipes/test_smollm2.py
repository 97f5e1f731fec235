"""The recipe on the tiny target: it runs, goes on where it stopped, and its runs differ by what they say."""

import json

import pytest
from safetensors.numpy import load_file

import smollm2 as recipe_module
from dflash_jax.core import InputError, save_tensors
from support import tiny, tiny_chain


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The tiny target with room for the built-in prompts, which never says the token that masks a block's slots."""
    folder = tmp_path_factory.mktemp("tiny") / "target"
    tiny.write_tiny_target(folder, seed=tiny.TARGET_SEED, max_position_embeddings=4096)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][tiny.MASK_ID] = 0.5 * weights["lm_head.weight"][tiny.MASK_ID + 1]
    save_tensors(folder / "model.safetensors", weights)
    return folder


def small(folder, target, **changes):
    settings = {
        "out": folder / "out",
        "target": target,
        "in_process": True,
        "mix": "stdlib/complete=4,stdlib/implement=2",
        "choosing": "stdlib/complete=2",
        "max_new_tokens": 12,
        "response_batch": 3,
        "capture_layers": "1,2,3",
        "top_k": 4,
        "block_size": 4,
        "num_layers": 3,
        "steps": 4,
        "sequences_per_step": 2,
        "anchors_per_sequence": 5,
        "held_out": 3,
        "decode_prompts": 1,
        "held_out_tokens": 12,
    }
    return recipe_module.Recipe(**settings | changes)


@pytest.mark.slow
def test_the_whole_recipe_and_again(tmp_path, target):
    recipe = small(tmp_path, target, vary=("loss=d-pace",))
    assert recipe_module.main(recipe) == 0
    results = json.loads((recipe.out / "results.json").read_text())
    print(results["seconds"])
    assert list(results["runs"]) == ["full", "loss=d-pace"]
