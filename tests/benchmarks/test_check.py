"""The check's benchmark, on a tiny chain: it runs, and both ways give the same answers."""

import json

import pytest

import check as benchmark
from dflash_jax.drafter import save_drafter
from support import tiny, tiny_chain


def test_flops_by_hand():
    config = tiny.tiny_drafter_config(num_layers=1, block_size=2, vocab_size=50)
    # 24 -> 6 x 10 queries and back, 3 x 10 keys and values, 29 in the MLP; 48 features
    projections = 24 * (60 + 60 + 30 + 30) + 3 * 24 * 29
    assert benchmark.count_flops(config, width=100) == {
        "context": 2 * 100 * (48 * 24 + 24 * 60),
        # scores and values of both slots over 100 context rows and 2 slots
        "block": 2 * (2 * projections + 2 * 2 * 60 * 102),
        "head": 2 * 1 * 24 * 50,
    }


@pytest.mark.slow
def test_it_runs_and_the_answers_are_equal(tmp_path, capsys):
    target = tiny.tiny_target()
    cache = tiny_chain.make_cache(
        tmp_path / "chain", target, tiny.TEXTS[:4], max_new_tokens=24, position_offsets=(0, 9)
    )
    (tmp_path / "drafter").mkdir()
    save_drafter(tiny.half_memorised(), tmp_path / "drafter")
    folders = ("--target", str(target), "--cache", str(cache), "--drafter", str(tmp_path / "drafter"))
    code = benchmark.main([*folders, "--rounds", "2", "--anchors-per-sequence", "9", "--matmul-size", "64"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == result["num_differing"] == 0
    assert (result["sequences"], result["num_anchors"]) == (2, 18)
    assert result["accept_len_mean"] > 0
    assert result["ratio"]["rounds"] == 2
    assert result["flops_per_anchor"]["one_at_a_time"] > result["flops_per_anchor"]["check_at_most"]
