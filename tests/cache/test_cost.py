"""The cost of a cache, told before, against what was built and against sums by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dflash_jax.cache import CacheBuildConfig, CacheCostConfig, build, cache_cost
from dflash_jax.cache.capture import TargetCapture
from dflash_jax.core import InputError
from support import tiny, toy_cache
from support.gpt_oss import GPT_OSS_20B


@pytest.fixture
def gpt_oss(tmp_path):
    (tmp_path / "gpt-oss-20b").mkdir()
    (tmp_path / "gpt-oss-20b" / "config.json").write_text(json.dumps(GPT_OSS_20B))
    return tmp_path / "gpt-oss-20b"


SETTINGS = [
    {},
    {"features": "int8"},
    {"features": "float8", "position_offsets": (0, 7, 4096)},
    {"features": "float32", "share_prompts": False},
    {"tokens_per_batch": 512, "tokens_per_shard": 10000},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_bytes_are_those_of_the_build(tmp_path, settings):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(20, responses=2))
    built = toy_cache.build_toy(tmp_path, **settings)
    asked = {"capture_layers": (1, 3), "position_offsets": (0, 1000), "tokens_per_batch": 256, "tokens_per_shard": 600}
    cost = cache_cost(
        CacheCostConfig(
            target=tmp_path / "target", responses=tmp_path / "responses.jsonl", device="h100", **asked | settings
        )
    )
    assert cost["bytes"]["total"] == built["bytes"]
    assert sum(cost["bytes"].values()) == 2 * built["bytes"]
    for name in ("num_sequences", "num_tokens", "num_shards"):
        assert cost[name] == built[name]


def test_gpt_oss_20b_from_its_config_alone(gpt_oss):
    cost = cache_cost(
        CacheCostConfig(
            target=gpt_oss,
            num_sequences=1000,
            length=2048,
            device="h100",
            dtype="bfloat16",
            mesh="data=2,model=4",
            tokens_per_batch=65536,
        )
    )
    assert cost["num_tokens"] == 2_048_000
    assert cost["bytes_per_token"] == 23049
    headers = cost["bytes"]["per_sequence_and_headers"] - 1000 * 42
    assert cost["bytes"]["total"] == 2_048_000 * 23049 + 1000 * 42 + headers
    assert 0 < headers < 2048 * cost["num_shards"]
    # 3.6 billion parameters work on a token, the head among them: 2 FLOPs each, and attention
    assert cost["active_parameters"] == pytest.approx(4.19e9, rel=0.01)  # the embedding's 0.58 too
    padded = cost["padded_tokens"]
    assert 2_048_000 <= padded <= 2_048_000 * 1.06
    products = 2 * (cost["active_parameters"] - 201088 * 2880) * padded
    pairs = 12 * (2048 * 2049 / 2) + 12 * (128 * 129 / 2 + (2048 - 128) * 128)
    attention = 4 * 64 * 64 * pairs * padded / 2048
    assert cost["flops"]["total"] == pytest.approx(products + attention)
    assert cost["flops"]["head"] == 2 * padded * 201088 * 2880
    time = cost["time"]
    assert time["total_s"] == pytest.approx(cost["flops"]["total"] / (8 * 989e12 * 0.4), rel=1e-3)
    assert (time["num_devices"], time["fits"]) == (8, True)


def test_a_forward_of_few_tokens_is_bound_by_reading_the_weights(gpt_oss):
    cost = cache_cost(
        CacheCostConfig(
            target=gpt_oss,
            num_sequences=3,
            length=64,
            device="v6e",
            tokens_per_batch=64,
            mesh="model=8",
            dtype="bfloat16",
        )
    )
    time = cost["time"]
    assert time["shapes_bound_by_reading_weights"] == 1
    assert time["total_s"] == pytest.approx(3 * time["weight_bytes_per_device"] / 1.64e12, rel=1e-3)


def test_float32_takes_twice_the_memory_and_the_time(gpt_oss):
    half, whole = (
        cache_cost(CacheCostConfig(target=gpt_oss, num_sequences=9, length=2048, device="h100", dtype=dtype))["time"]
        for dtype in ("bfloat16", "float32")
    )
    assert half["weight_bytes_per_device"] * 2 == whole["weight_bytes_per_device"]
    assert whole["total_s"] == pytest.approx(2 * half["total_s"], rel=1e-3)
    assert (half["fits"], whole["fits"]) == (True, False)
    assert (half["how"].split()[0], whole["how"].split()[0]) == ("bfloat16", "float32")


def test_times_fewer_than_one_context_per_sample(gpt_oss):
    ask = lambda features: cache_cost(
        CacheCostConfig(target=gpt_oss, num_sequences=1, length=9, device="v5p", features=features)
    )["baseline"]
    assert ask("bfloat16") == {
        "settings": "ctx 1024, block 8, 64 rollout steps, K=4, H=2880",
        "one_context_per_sample_bytes": 1508474880,
        "sum": "64 x 1023 x 11520 x 2",
        "token_once_bytes": 1536 * 23049 + 50,
        "times_fewer": 42.6,
    }
    assert ask("int8")["times_fewer"] > 1.93 * 42.6
    assert ask("float8")["times_fewer"] > 1.99 * 42.6


@pytest.mark.slow  # compiles a target and builds with it
def test_calibrated_time_has_its_parts(tmp_path):
    target = tiny.write_tiny_target(tmp_path / "target")
    draw = np.random.default_rng(0)
    rows = [(draw.integers(4, 50, 9).tolist(), draw.integers(4, 50, n).tolist()) for n in (20, 60, 90, 33)]
    toy_cache.write_responses(tmp_path / "r.jsonl", rows)
    asked = {"target": target, "responses": tmp_path / "r.jsonl", "capture_layers": (1, 3), "out": tmp_path / "cache"}
    cost = cache_cost(CacheCostConfig(**asked))
    time = cost["time"]
    assert time["total_s"] >= time["load_s"] + time["compile_s"] + time["forward_s"] > 0
    assert time["forward_s"] == pytest.approx(cost["flops"]["total"] / time["flops_per_s"], rel=1e-3)
    assert not (tmp_path / "cache").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"target", "r.jsonl"}
    assert build(CacheBuildConfig(**asked), fingerprint={})["bytes"] == cost["bytes"]["total"]


@pytest.mark.parametrize(("length", "shape"), [(700, (1, 512)), (100, (4, 128)), (40, (8, 64))])
def test_a_batch_that_is_tried_on_a_cpu_is_small(tmp_path, monkeypatch, length, shape):
    """Of the batch that the build runs most often, at most 512 tokens, its length cut before its rows."""
    tried = []

    def start(_, tokens, lengths, offsets, *, by_layers, **_kept):
        tried.append((tokens.shape, lengths.tolist(), len(offsets), by_layers))
        return SimpleNamespace(features=np.zeros(1)), None

    monkeypatch.setattr(TargetCapture, "start", start)
    target = tiny.write_tiny_target(tmp_path / "target", max_position_embeddings=2048)
    texts = np.random.default_rng(0).integers(4, 50, (6, length)).tolist()
    toy_cache.write_responses(tmp_path / "r.jsonl", [(text[:9], text[9:]) for text in texts])
    cache_cost(
        CacheCostConfig(
            target=target, responses=tmp_path / "r.jsonl", capture_layers=(1,), tokens_per_batch=4096,
            out=tmp_path / "cache",
        )
    )  # fmt: skip
    assert tried == [(shape, [shape[1]] * shape[0], shape[0], True)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "cache cost needs the texts: give either --responses, or --num-sequences and --length"),
        ({"num_sequences": 3}, "cache cost needs the texts"),
        ({"responses": "r", "length": 3}, "cache cost needs the texts"),
        ({"num_sequences": 0, "length": 9}, "--num-sequences is 0, --length is 9: at least 1 and 2 are needed"),
        ({"num_sequences": 1, "length": 1}, "--num-sequences is 1, --length is 1: at least 1 and 2 are needed"),
        ({"num_sequences": 1, "length": 9, "device": "abacus"}, "--device is 'abacus': choose one of h100, h200, v5p"),
        ({"num_sequences": 1, "length": 9}, "without --responses there is nothing to try here: name a --device"),
        ({"num_sequences": 1, "length": 9, "device": "v5p", "utilisation": 0.0}, "--utilisation is 0.0: more than 0"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    if "responses" in changes:
        changes = changes | {"responses": tmp_path}
    with pytest.raises(InputError, match=message):
        CacheCostConfig(target=tmp_path, **changes)


def test_length_beyond_the_context(gpt_oss):
    with pytest.raises(InputError, match="--length is 131073, the target's context is 131072: lower it"):
        cache_cost(CacheCostConfig(target=gpt_oss, num_sequences=1, length=131073, device="h100"))
