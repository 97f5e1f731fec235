import json
from pathlib import Path

import numpy as np
import pytest

from dflash_jax.core import InputError
from dflash_jax.drafter import save_drafter
from dflash_jax.generate import DecodeConfig, decode_prompts
from dflash_jax.text import load_tokenizer
from support import tiny

MAX_NEW = 38  # as in tests/decode/test_engine.py: the same shapes are compiled once
# the contract of the design, section 5
COMPARE_KEYS = {
    "tokens_equal", "tau_micro", "tau_macro", "tokens_per_s", "plain_tokens_per_s", "speedup", "num_prompts",
    "num_tokens", "block_size",
}  # fmt: skip


def config(target, drafter, prompts, **changes):
    settings = {"target": target, "drafter": drafter, "prompts": prompts, "max_new_tokens": MAX_NEW, "batch_size": 3}
    return DecodeConfig(**settings | changes)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, drafter):
    """The result of `--compare --out` on all prompts, and its rows."""
    folder = tmp_path_factory.mktemp("compared")
    prompts = str(tiny.write_prompts(folder / "prompts.jsonl", tiny.TEXTS))
    out = folder / "rows.jsonl"
    result = decode_prompts(config(tiny.tiny_target(), drafter, prompts, compare=True, out=out))
    return result, [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]], out


def test_the_comparison_has_the_contract_s_keys_and_adds_up(compared):
    result, rows, _ = compared
    assert set(result) >= COMPARE_KEYS
    assert result["tokens_equal"] is True
    assert (result["num_prompts"], result["block_size"]) == (8, 5)
    assert result["num_tokens"] == sum(len(row["response_ids"]) for row in rows)
    blocks = [n for row in rows for n in row["accepted"]]
    assert result["tau_micro"] == pytest.approx(sum(blocks) / len(blocks))
    means = [np.mean(row["accepted"]) for row in rows]
    assert result["tau_macro"] == pytest.approx(np.mean(means))
    assert 1.2 < result["tau_micro"] < 5
    assert abs(result["tau_micro"] - result["tau_macro"]) > 1e-3  # else the two could be swapped
    assert result["speedup"] == pytest.approx(result["tokens_per_s"] / result["plain_tokens_per_s"])


def test_rows_are_in_the_prompts_order_with_text_by_blocks(compared, target):
    result, rows, out = compared
    tokenizer = load_tokenizer(target)
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(8)]
    for row, text in zip(rows, tiny.TEXTS, strict=True):
        assert row["prompt"] == text
        assert row["text"] == tokenizer.decode(row["response_ids"])
        assert "".join(row["pieces"]) == tokenizer.decode(row["response_ids"], skip_special_tokens=False)
        assert len(row["pieces"]) == len(row["response_ids"]) == 1 + sum(row["accepted"])
        assert row["finish"] == ("stop" if row["response_ids"][-1] == tiny.STOP_ID else "length")
        assert row["tau"] == pytest.approx(np.mean(row["accepted"]))
        assert row["tokens_equal"] is True
    assert result["text"] == rows[0]["text"]
    record = json.loads(Path(f"{out}.record.json").read_text())
    assert record["command"] == "decode"
    assert len(record["drafter_sha256"]) == 64


def test_without_compare_and_far_away_the_tokens_are_the_same(compared, target, drafter, tmp_path):
    _, rows, _ = compared
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS[:3]))
    result = decode_prompts(config(target, drafter, prompts, position_offset=131072, out=tmp_path / "rows.jsonl"))
    assert [result[key] for key in ("tokens_equal", "plain_tokens_per_s", "speedup")] == [None, None, None]
    assert (result["batch_size"], result["position_offset"]) == (3, 131072)
    far = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_bytes().split(b"\n")[:-1]]
    for ours, theirs in zip(far, rows, strict=False):
        assert ours == theirs | {"tokens_equal": None}


def test_a_drafter_of_another_target_is_refused(target, prompts, tmp_path):
    sizes = tiny.tiny_drafter_config(vocab_size=59, num_target_layers=7, hidden_size=26)
    save_drafter(tiny.random_drafter(sizes), tmp_path)
    with pytest.raises(InputError) as error:
        decode_prompts(config(target, tmp_path, prompts))
    assert str(error.value) == (
        f"the drafter {tmp_path} does not fit the target: hidden_size is 26, the target's is 24; vocab_size is 59, the "
        "target's is 53; num_target_layers is 7, the target's is 5"
    )


def test_block_sizes_out_of_range(target, drafter, prompts):
    with pytest.raises(InputError, match="--block-size is 6: the drafter was trained for blocks of 5, at most that"):
        decode_prompts(config(target, drafter, prompts, block_size=6))
    with pytest.raises(InputError, match="--block-size is 1: at least 2 are needed"):
        config(target, drafter, prompts, block_size=1)


@pytest.mark.parametrize("offset", [-1, 2**31 - tiny.CONTEXT])
def test_an_offset_that_leaves_no_room(target, drafter, prompts, offset):
    with pytest.raises(InputError, match=f"--position-offset is {offset}: .* it must lie in 0..2147483487"):
        decode_prompts(config(target, drafter, prompts, position_offset=offset))


def test_paths_that_are_not_there(target, drafter, prompts, tmp_path):
    with pytest.raises(InputError, match="no target folder at .*/gone"):
        decode_prompts(config(tmp_path / "gone", drafter, prompts))
    with pytest.raises(InputError, match="no drafter folder at .*/gone"):
        decode_prompts(config(target, tmp_path / "gone", prompts))
    with pytest.raises(InputError, match="gone is neither a file nor a built-in prompt set"):
        decode_prompts(config(target, drafter, "gone"))
