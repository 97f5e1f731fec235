"""`Decoder` against z-lab's own loop on the same folders, and at the ends of a batch, a context, a response."""

import numpy as np
import pytest
import torch

from dflash_jax.decode import Decoder, Sampling, engine
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


@pytest.mark.slow
def test_plain_tokens_are_transformers_and_fewer_prompts_than_rows_are_fine(decoder, prompts, hf_target):
    rows = decoder.decode(prompts[:2]).rows
    assert len(rows) == 2
    for prompt, row in zip(prompts, rows, strict=False):
        assert row.tokens == hf_greedy(hf_target, prompt, max_new_tokens=MAX_NEW, stop_id=tiny.STOP_ID)
        assert row.committed == [1] * (len(row.tokens) - 1)
    assert (rows[0].stopped, rows[1].stopped) == (True, False)


@pytest.mark.slow
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


@pytest.mark.slow
def test_prompts_at_offsets_of_their_own(decoder, drafter, prompts):
    near = decoder.decode(prompts[:2], drafter=drafter).rows
    assert decoder.decode(prompts[:2], drafter=drafter, position_offset=[2**30, 4096]).rows == near
    assert decoder.decode(prompts[:2], position_offset=[0, 131072]).rows[1].tokens == near[1].tokens
    with pytest.raises(ValueError, match="3 position offsets for 2 prompts: give one for all or one for each"):
        decoder.decode(prompts[:2], position_offset=[0, 1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 6])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.9, top_p=0.95, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("block_size", [None, 3], ids=["plainly", "with a drafter"])
def test_a_queue_gives_every_prompt_the_tokens_that_it_has_alone(
    target, drafter, prompts, batch_size, sampling, block_size
):
    """More prompts than rows; texts that end by a stop id, by the budget and at once; blocks are those of `decode`."""
    how = {} if block_size is None else {"drafter": drafter, "block_size": block_size}
    decoder = Decoder(target, stop_ids=[tiny.STOP_ID], max_new_tokens=MAX_NEW, batch_size=batch_size)
    many = [*prompts, *(prompt[:2] for prompt in prompts[:5])]
    streams = [7 * place + 1 for place in range(len(many))]
    parts = list(decoder.queue(many, sampling=sampling, streams=streams, **how))
    found = dict(pair for part in parts for pair in part)
    assert sorted(place for part in parts for place, _ in part) == list(range(len(many)))
    alone = Decoder(target, stop_ids=[tiny.STOP_ID], max_new_tokens=MAX_NEW, batch_size=1)
    for place, prompt in enumerate(many):
        told = {"sampling": sampling, "streams": streams[place : place + 1]}
        assert found[place] == alone.decode([prompt], **told, **how).rows[0], place
        assert found[place].tokens == alone.decode([prompt], **told).rows[0].tokens, place
    assert {row.stopped for row in found.values()} == {True, False}


@pytest.mark.slow
def test_a_queue_has_room_for_its_last_block(target, drafter):
    """A prompt as wide as its bucket and a budget that ends a row before 64 more: the last block lies across them."""
    prompt = np.random.default_rng(3).integers(4, len(tiny.TOKENS), 64).tolist()
    decoder = Decoder(target, stop_ids=[], max_new_tokens=62, batch_size=1)
    (((_, queued),),) = decoder.queue([prompt], drafter=drafter)
    assert queued == decoder.decode([prompt], drafter=drafter).rows[0]
    assert queued.tokens == decoder.decode([prompt]).rows[0].tokens


@pytest.mark.slow
def test_a_queue_does_not_wait_for_its_longest_text(target, prompts, monkeypatch):
    """Three rows, one of which is long: the others go on with further prompts beside it."""
    decoder = Decoder(target, stop_ids=[tiny.STOP_ID], max_new_tokens=MAX_NEW, batch_size=3)
    lengths = [len(row.tokens) for prompt in prompts for row in decoder.decode([prompt]).rows]
    assert max(lengths) > 2 * min(lengths)
    steps = []
    executable = Decoder._executable

    def counted(self, jitted, dynamic, static):
        run = executable(self, jitted, dynamic, static)

        def call(**arguments):
            before = np.array(arguments["state"].num_blocks)
            after = run(**arguments)
            steps.append(int((np.asarray(after.num_blocks) - before).max()))  # of the row that went on longest
            return after

        return call if jitted is engine._until else run

    monkeypatch.setattr(Decoder, "_executable", counted)
    list(decoder.queue(prompts))
    batches = [lengths[first : first + 3] for first in range(0, len(lengths), 3)]
    assert sum(steps) < sum(max(batch) - 1 for batch in batches)


@pytest.mark.parametrize("blocks_per_step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_stream_is_decoding_in_parts(decoder, drafter, prompts, blocks_per_step):
    chosen = [prompts[i] for i in (0, 2, 5)]
    whole = decoder.decode(chosen, drafter=drafter).rows
    steps = list(decoder.stream(chosen, drafter=drafter, blocks_per_step=blocks_per_step))
    assert [len(row.tokens) for row in steps[0].rows] == [1, 1, 1]
    assert all(row.committed == [] for row in steps[0].rows)
    for number, row in enumerate(whole):
        parts = [step.rows[number] for step in steps]
        assert [token for part in parts for token in part.tokens] == row.tokens
        assert [count for part in parts for count in part.committed] == row.committed
        assert [count for part in parts for count in part.accepted] == row.accepted
        assert all(len(part.committed) <= blocks_per_step for part in parts)
        done = [step.done[number] for step in steps]
        last = done.index(True)
        assert all(done[last:])
        assert all(part.tokens == [] for part in parts[last + 1 :])
        assert parts[last].stopped is row.stopped
    most = max(len(row.committed) for row in whole)
    assert len(steps) == 1 + -(-most // blocks_per_step)


def test_plain_decoding_streams_too_and_may_be_left(decoder, prompts):
    whole = decoder.decode(prompts[1:2]).rows[0].tokens
    parts = [step.rows[0] for step in decoder.stream(prompts[1:2], blocks_per_step=8)]
    assert [token for part in parts for token in part.tokens] == whole
    assert {tuple(part.committed) for part in parts[1:-1]} == {(1,) * 8}
    left = decoder.stream(prompts[1:2], blocks_per_step=8)
    assert next(left).rows[0].tokens == whole[:1]
    left.close()


def test_what_was_drafted_is_told_from_the_target_s_own(decoder, drafter, prompts):
    rows = decoder.decode([prompts[i] for i in (0, 2, 5)], drafter=drafter).rows
    for row in rows:
        # a block holds its accepted drafts and one token more, but where the text ends inside it
        assert all(n == m + 1 for n, m in zip(row.committed[:-1], row.accepted[:-1], strict=True))
        assert row.committed[-1] - row.accepted[-1] in (0, 1)
    assert {row.committed[-1] - row.accepted[-1] for row in rows} == {0, 1}
    plain = decoder.decode(prompts[:1]).rows[0]
    assert plain.accepted == [0] * len(plain.committed)
