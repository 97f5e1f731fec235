"""`--rope` of a build: what it is called in the fingerprint, and what it does to features."""

import json
from pathlib import Path

import numpy as np
import pytest

from dflash_jax import cache, targets
from dflash_jax.cache import CacheBuildConfig
from dflash_jax.core import InputError
from dflash_jax.generate import DecodeConfig, ResponsesConfig
from support import tiny, toy_cache


def built(folder, rope):
    toy_cache.write_responses(folder / "r.jsonl", [([5, 6, 7, 8], [9, 10, 11, 12, 13])])
    config = CacheBuildConfig(
        target=tiny.tiny_target(), responses=folder / "r.jsonl", out=folder / "cache", capture_layers=(1, 3),
        position_offsets=(0, 65536), features="float32", rope=rope,
    )  # fmt: skip
    cache.build(config, fingerprint=targets.fingerprint(tiny.tiny_target()))
    manifest = json.loads((folder / "cache" / "manifest.json").read_text())
    made = cache.open_cache(folder / "cache")
    near, far = sorted((made.sequence(i) for i in range(2)), key=lambda sequence: sequence.position_offset)
    return manifest["fingerprint"]["rope"], np.abs(far.features - near.features).max() / np.abs(near.features).max()


@pytest.mark.slow
def test_a_build_with_a_table_that_ends_says_so_and_drifts(tmp_path):
    told, drift = built(tmp_path, "table:4096")
    assert told == {"theta": 5000.0, "head_dim": 6, "precision": "table:4096"}
    assert drift > 0.05  # past the table's end all positions are one


def test_exact_angles_are_the_default_and_do_not_drift(tmp_path):
    told, drift = built(tmp_path, "exact")
    assert told == {"theta": 5000.0, "head_dim": 6}, "as caches of the first version"
    assert drift < 1e-5
    assert CacheBuildConfig.__dataclass_fields__["rope"].default == "exact"


@pytest.mark.parametrize(
    "make",
    [
        lambda rope: CacheBuildConfig(target=Path("t"), responses=Path("r"), out=Path("o"), rope=rope),
        lambda rope: ResponsesConfig(target=Path("t"), prompts="humaneval", out=Path("o"), rope=rope),
        lambda rope: DecodeConfig(target=Path("t"), drafter=Path("d"), prompts="humaneval", rope=rope),
    ],
)
def test_a_rope_setting_that_is_none_is_refused_at_once(make):
    with pytest.raises(InputError, match="the rope setting is 'fp32': choose exact, float32, bfloat16 or table:N"):
        make("fp32")
