"""The whole build against transformers on a random Llama: right layers, before the norm, any offset, any padding."""

import json

import jax
import numpy as np
import pytest

from dflash_jax import cache, targets
from dflash_jax.cache.capture import target_capture
from support import tiny, toy_cache

LAYERS = (2, 0)


@pytest.mark.slow  # compiles the tiny target three times
def test_a_mesh_gives_the_same_features_and_bfloat16_nearly_so(tmp_path):
    """By the command's own way, the self-test on the mesh included; conftest gives a CPU of two devices."""
    folder, draw = tiny.tiny_target(), np.random.default_rng(0)
    ids = lambda count: draw.integers(4, len(tiny.TOKENS), count).tolist()
    toy_cache.write_responses(tmp_path / "r.jsonl", [(ids(9), ids(40)), (ids(3), ids(30)), (ids(6), ids(20))])

    def features(name, **changes):
        config = cache.CacheBuildConfig(
            target=folder, responses=tmp_path / "r.jsonl", out=tmp_path / name, capture_layers=(1, 3),
            features="float32", **changes,
        )  # fmt: skip
        if name == "mesh":
            built = cache.build(config, fingerprint={})
            assert (built["mesh"], built["whole_axes"]) == ("data=2", [])
            assert all(finding["holds"] for finding in built["self_test"].values())
        else:
            sizes = targets.read_target_config(folder)
            cache.build_cache(config, fingerprint={}, capture=target_capture(config, sizes, mesh=None))
        opened = cache.open_cache(tmp_path / name)
        return np.concatenate([opened.sequence(i).features for i in range(3)])

    whole = features("whole")
    assert np.abs(features("mesh", mesh="data=2") - whole).max() < 1e-5 * np.abs(whole).max()  # measured 2e-6
    half = features("half", dtype="bfloat16")
    error = np.sqrt(((half - whole) ** 2).mean() / (whole**2).mean())
    assert 1e-4 < error < 0.1
    # whatever is stored, the forward was bfloat16's
    np.testing.assert_array_equal(half, half.astype("bfloat16").astype(np.float32))


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=2", marks=pytest.mark.slow)])
def test_layers_apart_give_what_the_whole_program_gives(mesh, tmp_path):
    folder = tiny.tiny_target()
    sizes = targets.read_target_config(folder)
    config = cache.CacheBuildConfig(
        target=folder, responses=tmp_path, out=tmp_path, capture_layers=(1, 3), features="float32", top_k=4, mesh=mesh
    )
    capture = target_capture(config, sizes, mesh=targets.open_mesh(sizes, mesh, local=True))
    tokens = np.random.default_rng(0).integers(4, len(tiny.TOKENS), (3, 16)).astype(np.int32)
    batch = (tokens, np.array([16, 9, 1], np.int32), np.array([0, 70000, 3], np.int32))
    whole, memory = capture.start(*batch, keep=True)
    apart, memory_apart = capture.start(*batch, keep=True, by_layers=True)
    assert whole.features is not None
    assert apart.features is not None
    np.testing.assert_allclose(apart.features, whole.features, rtol=1e-4, atol=1e-5)
    for ours, theirs in ((apart.next_ids, whole.next_ids), (apart.top_ids, whole.top_ids)):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(jax.tree.leaves(memory_apart), jax.tree.leaves(memory), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    """A target folder of 5 layers, with the model that wrote it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.slow  # torch and transformers take seconds to import
def test_features_and_next_ids_are_those_of_transformers(random_llama, tmp_path):
    import torch

    folder, model = random_llama
    draw = np.random.default_rng(1)
    rows = [
        (draw.integers(0, 101, p).tolist(), draw.integers(0, 101, r).tolist()) for p, r in [(3, 60), (1, 2), (90, 41)]
    ]
    toy_cache.write_responses(tmp_path / "r.jsonl", rows)
    config = cache.CacheBuildConfig(
        target=folder, responses=tmp_path / "r.jsonl", out=tmp_path / "cache", capture_layers=LAYERS,
        position_offsets=(0, 131072), features="float32", tokens_per_batch=256,
    )  # fmt: skip
    cache.build(config, fingerprint=targets.fingerprint(folder))
    built = cache.open_cache(tmp_path / "cache")
    assert built.num_sequences == 6
    for i in range(6):
        sequence = built.sequence(i)
        prompt, response = rows[sequence.sequence_index]
        with torch.no_grad():
            wanted = model(torch.tensor([prompt + response]), output_hidden_states=True)
        features = np.concatenate([wanted.hidden_states[layer + 1][0].numpy() for layer in LAYERS], axis=-1)
        # measured: 4e-6 of the largest, at either offset
        assert np.abs(sequence.features - features).max() < 2e-5 * np.abs(features).max()
        assert sequence.next_ids.tolist() == wanted.logits[0].argmax(-1).tolist()


@pytest.mark.slow
def test_default_layers_rope_and_bfloat16_are_recorded(random_llama, tmp_path):
    folder, _ = random_llama
    toy_cache.write_responses(tmp_path / "r.jsonl", [([5, 6], [7])])
    config = cache.CacheBuildConfig(
        target=folder, responses=tmp_path / "r.jsonl", out=tmp_path / "cache", capture_layers=(1,)
    )
    cache.build(config, fingerprint={"target_weights": "w"})
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["fingerprint"] == {
        "target_weights": "w",
        "rope": {"theta": 10000.0, "head_dim": 4},
        "capture_layers": [1],
        "features_dtype": "bfloat16",
    }
    assert cache.open_cache(tmp_path / "cache").sequence(0).features.dtype.name == "bfloat16"
    with pytest.raises(ValueError, match="4 capture layers cannot be spread over a target of 5 layers"):
        cache.build(
            cache.CacheBuildConfig(target=folder, responses=tmp_path / "r.jsonl", out=tmp_path / "other"),
            fingerprint={},
        )
