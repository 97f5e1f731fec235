"""The whole build against transformers on a random Llama: right layers, before the norm, any offset, any padding."""

import json

import numpy as np
import pytest

from dflash_jax import cache, targets
from support import toy_cache

LAYERS = (2, 0)


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
