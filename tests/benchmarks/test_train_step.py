"""The training step's benchmark: its FLOPs by hand, and that it runs on tiny shapes, without its reference."""

import json

import pytest

import train_step as benchmark

SIZES = {
    "tokens": 48, "anchors": 8, "block-size": 4, "layers": 2, "capture": 2, "hidden": 32, "intermediate": 48,
    "heads": 4, "kv-heads": 2, "head-dim": 8, "vocab": 300, "sequences": 2, "rounds": 2, "ceiling-size": 64,
}  # fmt: skip
TINY = [*(f"--{name}={size}" for name, size in SIZES.items()), "--alone"]


def test_flops_by_hand():
    # 32 rows of slots, 24 of them drafted; queries 4 x 8, keys and values 2 x 8, features 2 x 32
    assert benchmark.flops(benchmark.parse(TINY)) == {
        "fc": 2 * 2 * 48 * 64 * 32,
        "context": 3 * 2 * 2 * 48 * 2 * 32 * 16,
        "layers": 3 * 2 * 2 * 32 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48),
        "attention": 3 * 2 * 2 * 32 * 2 * 32 * (48 + 4),
        "head": 2 * 2 * 24 * 32 * 300,
    }


@pytest.mark.slow
def test_it_runs_and_says_what_it_measured(capsys):
    assert benchmark.main([*TINY, "--sampled-vocab=64"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["rates"]) == {"ours", "ours_many", "ours_sampled", "ceiling", "label_logits"}
    assert result["rates"]["ours_many"]["anchors_per_s"] > 0
    assert result["ratio"]["wall_s"]["share_of_ceiling"]["rounds"] == 2
    assert result["ratio"]["wall_s"]["sampled_speedup"]["median"] > 0
    assert set(result["memory"]) == {"ours_1", "ours_2", "ours_sampled_1", "ours_sampled_2"}
    assert 0 < result["said_bytes"]["1"] < result["memory"]["ours_1"]["host_bytes"]
