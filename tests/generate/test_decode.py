import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dflash_jax.core import InputError
from dflash_jax.decode import Decoder, engine
from dflash_jax.drafter import load_drafter, save_drafter
from dflash_jax.generate import DecodeConfig, decode_prompts, stream_text
from dflash_jax.targets import load_target
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
    low, high = result["speedup_ci95"]
    assert low <= result["speedup"] <= high


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
    assert [result[key] for key in ("tokens_equal", "plain_tokens_per_s", "speedup", "speedup_ci95")] == [None] * 4
    assert (result["batch_size"], result["position_offset"]) == (3, 131072)
    far = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_bytes().split(b"\n")[:-1]]
    for ours, theirs in zip(far, rows, strict=False):
        assert ours == theirs | {"tokens_equal": None}


@pytest.mark.slow
def test_a_mesh_changes_no_token_and_no_block(compared, target, drafter, tmp_path):
    _, rows, _ = compared
    mesh = "data=2"
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS))
    out = tmp_path / "rows.jsonl"
    result = decode_prompts(config(target, drafter, prompts, mesh=mesh, compare=True, out=out))
    assert (result["mesh"], result["whole_axes"], result["tokens_equal"]) == (mesh, [], True)
    split = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    assert [row["response_ids"] for row in split] == [row["response_ids"] for row in rows]
    assert [row["accepted"] for row in split] == [row["accepted"] for row in rows]
    # one text at a time: rows that the mesh needs and nobody asked for are left out
    streamed = decode_prompts(config(target, drafter, prompts, mesh=mesh, batch_size=1, stream=True, limit=2, out=out))
    assert streamed["num_prompts"] == 2
    first, *_ = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    assert first["response_ids"] == next(row for row in rows if row["id"] == first["id"])["response_ids"]


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


@pytest.mark.slow
def test_sampling_reaches_the_tokens_and_both_ways_agree(compared, target, drafter, tmp_path):
    _, greedy, _ = compared
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS[:3]))
    sampled = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "sample_seed": 4}
    result = decode_prompts(config(target, drafter, prompts, compare=True, out=tmp_path / "rows.jsonl", **sampled))
    assert (result["tokens_equal"], result["differences"]) == (True, [])
    assert result["sampling"] == {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 4}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_bytes().split(b"\n")[:-1]]
    assert all(row["response_ids"] != other["response_ids"] for row, other in zip(rows, greedy, strict=False))
    # a prompt's samples hang on its id and the seed: alone it says the same
    alone = str(tiny.write_prompts(tmp_path / "alone.jsonl", tiny.TEXTS[:1]))
    assert decode_prompts(config(target, drafter, alone, **sampled))["text"] == rows[0]["text"]


@pytest.mark.parametrize("stream", [pytest.param(True, marks=pytest.mark.slow), False])
def test_pieces_of_texts_say_who_found_them(compared, target, drafter, tmp_path, stream):
    _, rows, _ = compared
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS[:3]))
    seen = []
    settings = {"stream": stream, "show_blocks": True, "batch_size": 1 if stream else 3}
    result = decode_prompts(config(target, drafter, prompts, out=tmp_path / "rows.jsonl", **settings), show=seen.append)
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_bytes().split(b"\n")[:-1]]
    assert again == [row | {"tokens_equal": None} for row in rows[:3]]
    for row in again:
        pieces = [piece for piece in seen if piece.id == row["id"]]
        assert "".join(piece.text for piece in pieces) == "".join(row["pieces"])
        assert [piece.ends_text for piece in pieces].index(True) == len(pieces) - 1
        assert sum(piece.ends_block for piece in pieces) == 1 + len(row["accepted"])
        sizes, size = [], 0
        for piece in pieces[1:]:
            size += piece.tokens
            if piece.ends_block:
                sizes, size = [*sizes, size], 0
        assert sizes == row["accepted"]
        assert 0 < sum(piece.tokens for piece in pieces if piece.drafted) < len(row["response_ids"])
    assert result["tokens_per_s"] > 0


@pytest.mark.slow
def test_text_streams_from_python(compared, target, drafter):
    _, rows, _ = compared
    tokenizer = load_tokenizer(target)
    decoder = Decoder(
        load_target(target), stop_ids=tokenizer.stop_ids, max_new_tokens=MAX_NEW, batch_size=1, prompt_bucket=64
    )
    pieces = list(stream_text(decoder, tokenizer, tokenizer.encode(tiny.TEXTS[1]), drafter=load_drafter(drafter)))
    assert len(pieces) > 5
    assert "".join(pieces) == rows[1]["text"]


@pytest.mark.slow
def test_bfloat16_runs_and_is_said(target, drafter, tmp_path):
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS[:2]))
    result = decode_prompts(config(target, drafter, prompts, compare=True, dtype="bfloat16", max_new_tokens=9))
    assert result["dtype"] == "bfloat16"
    assert result["tokens_equal"] is (result["differences"] == [])


@pytest.mark.slow
def test_a_token_that_is_not_plain_decoding_s_is_listed_with_its_margin(target, drafter, tmp_path, monkeypatch):
    """A drafter that is always believed: what is lost is found, and rounding does not explain it."""
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.TEXTS[:2]))
    monkeypatch.setattr("dflash_jax.decode.loop.accept_len", lambda *_, num_drafted: num_drafted)
    programs: list[Any] = [engine._speculative]
    programs[0].clear_cache()
    result = decode_prompts(config(target, drafter, prompts, compare=True))
    programs[0].clear_cache()
    assert result["tokens_equal"] is False
    for flip in result["differences"]:
        assert flip["plain_token"] != flip["speculative_token"]
        assert flip["plain_margin"] > 10 * flip["difference_max"]
        assert (flip["explained"], flip["reproduced"]) == (False, False)
        assert isinstance(flip["plain_text"], str)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 3}, "--top-k without --temperature: decoding is greedy at 0, give a positive temperature"),
        ({"top_k": 3, "top_p": 0.5}, "--top-k and --top-p without --temperature"),
        ({"temperature": -1.0}, "--temperature is -1.0: a positive number is needed"),
        ({"temperature": 1.0, "top_p": 2.0}, "--top-p is 2.0: a share above 0"),
        ({"stream": True, "batch_size": 3}, "--stream shows one text at a time: leave out --batch-size 3"),
    ],
)
def test_flags_that_do_not_go_together(target, drafter, prompts, changes, message):
    with pytest.raises(InputError, match=message):
        config(target, drafter, prompts, **changes)
