"""`Decoder` against z-lab's own loop on the same folders, and at the ends of a batch, a context, a response."""

import numpy as np
import pytest
import torch

from dflash_jax.decode import Decoder
from dflash_jax.drafter import save_drafter
from support import tiny, zlab

MAX_NEW = 38


@pytest.fixture(scope="module")
def decoder(target):
    return Decoder(target, stop_ids=[tiny.STOP_ID], max_new_tokens=MAX_NEW, batch_size=3)


@pytest.fixture(scope="module")
def hf_target():
    return zlab.load_hf_target(tiny.tiny_target())


@torch.inference_mode()
def hf_greedy(model, prompt, *, max_new_tokens, stop_id):
    """Transformers' greedy tokens, everything recomputed for each; the stop id ends it."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == stop_id:
            break
    return ids[len(prompt) :]


def test_tokens_and_accepted_lengths_are_z_lab_s(tmp_path, decoder, drafter, prompts, hf_target):
    save_drafter(drafter, tmp_path)
    theirs = zlab.load_zlab_drafter(tmp_path)
    chosen = [prompts[i] for i in (0, 2, 5, 1, 4, 7)]
    rows = [row for batch in (chosen[:3], chosen[3:]) for row in decoder.decode(batch, drafter=drafter).rows]
    for prompt, row in zip(chosen, rows, strict=True):
        run = zlab.zlab_generate(theirs, hf_target, prompt, max_new_tokens=MAX_NEW, stop_ids=[tiny.STOP_ID])
        assert row.tokens == run.tokens
        assert row.committed == run.committed
        assert row.stopped == (run.tokens[-1] == tiny.STOP_ID)
    assert {n for row in rows for n in row.committed} == {1, 2, 3, 4, 5}
    # one row ends with a stop id; another one at the budget with its last block cut there
    assert rows[0].stopped
    assert any(not row.stopped and 1 < row.committed[-1] < 5 for row in rows)


def test_plain_tokens_are_transformers_and_fewer_prompts_than_rows_are_fine(decoder, prompts, hf_target):
    rows = decoder.decode(prompts[:2]).rows
    assert len(rows) == 2
    for prompt, row in zip(prompts, rows, strict=False):
        assert row.tokens == hf_greedy(hf_target, prompt, max_new_tokens=MAX_NEW, stop_id=tiny.STOP_ID)
        assert row.committed == [1] * (len(row.tokens) - 1)
    assert (rows[0].stopped, rows[1].stopped) == (True, False)


def test_the_context_s_end_is_a_limit_too(target, drafter, hf_target):
    decoder = Decoder(target, stop_ids=[], max_new_tokens=MAX_NEW, batch_size=3)
    draw = np.random.default_rng(2)
    lengths = [tiny.CONTEXT - 1, tiny.CONTEXT - 2, tiny.CONTEXT - 9]
    long = [draw.integers(4, len(tiny.TOKENS), length).tolist() for length in lengths]
    rows = decoder.decode(long, drafter=drafter).rows
    for prompt, room, row in zip(long, (1, 2, 9), rows, strict=True):
        assert row.tokens == hf_greedy(hf_target, prompt, max_new_tokens=room, stop_id=None)
        assert sum(row.committed) == room - 1
        assert not row.stopped
