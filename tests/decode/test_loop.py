"""The laws of decoding: a drafter changes how fast the tokens come and never which."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.decode import (
    decode_capacity,
    draft,
    guided_loop,
    plain_step,
    speculative_loop,
    speculative_step,
    start_decoding,
    verify,
)
from dflash_jax.drafter import draft_blocks, with_draft_vocabulary
from dflash_jax.nn import greedy_tokens
from dflash_jax.targets import prefill
from support import tiny

BATCH, BUCKET, MAX_NEW, BLOCK = 8, 64, 30, 5
CAPACITY = decode_capacity(BUCKET, MAX_NEW, BLOCK)
NO_STOP = -1  # an id that is never produced, so that every run has the same shapes and is compiled once

start_jit = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))
loop_jit = jax.jit(speculative_loop, static_argnames=("block_size",))
step_jit = jax.jit(speculative_step, static_argnames=("block_size",))
draft_jit = jax.jit(draft, static_argnames=("block_size",))
guided_jit = jax.jit(guided_loop, static_argnames=("block_size",))
verify_jit, plain_jit = jax.jit(verify), jax.jit(plain_step)


def begin(target, drafter, prompts, *, new: np.typing.ArrayLike = MAX_NEW, offsets=0, stop=NO_STOP):
    """State after the prompts' pass; `new` and `offsets` for all rows or one each."""
    tokens = np.zeros((BATCH, BUCKET), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return start_jit(
        target,
        drafter,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        position_offset=jnp.asarray(np.broadcast_to(np.int32(offsets), BATCH)),
        limit=jnp.asarray((lengths + np.asarray(new)).astype(np.int32)),
        stop_ids=jnp.array([stop], jnp.int32),
        capacity=CAPACITY,
        max_new_tokens=MAX_NEW,
    )


def outcome(state, prompts):
    """New tokens and committed blocks of every row."""
    tokens, begin, committed, blocks = (
        np.asarray(x) for x in (state.tokens, state.start, state.committed, state.num_blocks)
    )
    return [
        (tokens[row, len(prompt) : begin[row] + 1].tolist(), committed[row, : blocks[row]].tolist())
        for row, prompt in enumerate(prompts)
    ]


def run(target, drafter, prompts, *, block_size=BLOCK, **options):
    return outcome(
        loop_jit(target, drafter, begin(target, drafter, prompts, **options), block_size=block_size), prompts
    )


@pytest.fixture(scope="module")
def wanted(target, prompts):
    """MAX_NEW greedy tokens of every prompt, everything recomputed for each token."""
    width = max(map(len, prompts)) + MAX_NEW
    tokens, zeros = np.zeros((BATCH, width), np.int32), jnp.zeros(BATCH, jnp.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    hidden = jax.jit(lambda t: prefill(target, t, lengths=zeros + width, position_offset=zeros).hidden)
    head, rows = np.asarray(target.head), np.arange(BATCH)
    lengths = np.array([len(prompt) for prompt in prompts])
    for new in range(MAX_NEW):
        at = lengths + new
        tokens[rows, at] = (np.asarray(hidden(jnp.asarray(tokens)))[rows, at - 1] @ head.T).argmax(axis=-1)
    return [tokens[row, length : length + MAX_NEW].tolist() for row, length in enumerate(lengths)]


def test_the_drafter_is_sometimes_right(target, drafter, prompts):
    lengths = [n for _, committed in run(target, drafter, prompts) for n in committed]
    assert set(lengths) == {1, 2, 3, 4, 5}  # else the laws below would prove little


def test_tokens_are_the_recomputed_greedy_ones(target, drafter, prompts, wanted):
    for model in (drafter, tiny.random_drafter(drafter.config)):
        for (tokens, committed), greedy in zip(run(target, model, prompts), wanted, strict=True):
            assert tokens == greedy
            assert sum(committed) == len(tokens) - 1
            assert all(1 <= n <= BLOCK for n in committed)


def test_a_draft_vocabulary_is_all_that_is_drafted_and_text_stays_the_target_s(target, drafter, prompts, wanted):
    """Its head's rows are taken once; a token outside ends a run of accepted ones, and comes from the target."""
    ids = np.setdiff1d(np.arange(len(tiny.TOKENS)), wanted[2][3::4])
    reduced = with_draft_vocabulary(drafter, ids)
    state, drafted = begin(target, reduced, prompts), []
    assert state.draft_head.tolist() == np.asarray(target.head)[ids].tolist()
    while not state.done.all():
        drafted.append(np.asarray(draft_jit(target, reduced, state, block_size=BLOCK)))
        state = step_jit(target, reduced, state, block_size=BLOCK)
    assert np.isin(drafted, ids).all()
    rows = run(target, reduced, prompts)
    assert outcome(state, prompts) == rows
    assert [tokens for tokens, _ in rows] == wanted
    whole = run(target, drafter, prompts)
    assert len(rows[2][1]) > len(whole[2][1])  # what is left out there was drafted right before
    assert max(n for _, committed in rows for n in committed) > 2


@pytest.mark.slow
def test_plain_steps_give_them_too(target, prompts, wanted):
    state = begin(target, None, prompts)
    while not state.done.all():
        state = plain_jit(target, state)
    for (tokens, committed), greedy in zip(outcome(state, prompts), wanted, strict=True):
        assert tokens == greedy
        assert committed == [1] * (MAX_NEW - 1)


@pytest.mark.slow
def test_a_stop_id_ends_a_sequence_wherever_it_falls_in_a_block(target, drafter, prompts, wanted):
    inside, blocks = 0, run(target, drafter, prompts)
    for stop in sorted(set(wanted[2][:14])):  # a sequence of long blocks
        for row, (tokens, committed) in enumerate(run(target, drafter, prompts, stop=stop)):
            cut = wanted[row].index(stop) + 1 if stop in wanted[row] else MAX_NEW
            assert tokens == wanted[row][:cut]
            assert sum(committed) == cut - 1
            whole = blocks[row][1][: len(committed)]
            assert committed[:-1] == whole[:-1]
            inside += committed != whole
    assert inside > 10


def test_the_token_budget_ends_a_sequence_wherever_it_falls_in_a_block(target, drafter, prompts, wanted):
    prompt = prompts[2]
    inside = 0
    for first in (1, 9, 17):
        budgets = np.arange(first, first + BATCH, dtype=np.int32)
        for (tokens, committed), budget in zip(
            run(target, drafter, [prompt] * BATCH, new=budgets), budgets, strict=True
        ):
            assert tokens == wanted[2][:budget]
            assert sum(committed) == budget - 1
            inside += bool(committed) and committed[-1] not in (1, BLOCK)
    assert inside > 5


def test_rows_do_not_know_their_batch_mates(target, drafter, prompts):
    budgets = np.array([30, 2, 9, 30, 1, 17, 30, 5], np.int32)  # rows end at different times
    together = run(target, drafter, prompts, new=budgets)
    backwards = run(target, drafter, prompts[::-1], new=budgets[::-1])[::-1]
    assert backwards == together
    for row in (0, 2, 5):
        alone = run(target, drafter, [prompts[row]] * BATCH, new=int(budgets[row]))
        assert alone == [together[row]] * BATCH


def test_every_row_has_its_own_position_offset(target, drafter, prompts):
    near = run(target, drafter, prompts)
    offsets = np.array([0, 1, 4096, 65536, 131072, 2**24, 2**30, 2**31 - 1 - CAPACITY], np.int32)
    assert run(target, drafter, prompts, offsets=offsets) == near


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [3])
def test_a_block_size_below_the_trained_one(target, drafter, prompts, wanted, block_size):
    rows = run(target, drafter, prompts, block_size=block_size)
    assert [tokens for tokens, _ in rows] == wanted
    assert {n for _, committed in rows for n in committed} == set(range(1, block_size + 1))


@pytest.mark.slow
def test_the_compiled_loop_is_a_python_loop_over_steps(target, drafter, prompts):
    state = begin(target, drafter, prompts, stop=tiny.STOP_ID)
    steps = 0
    while not state.done.all():
        state = step_jit(target, drafter, state, block_size=BLOCK)
        steps += 1
    assert outcome(state, prompts) == run(target, drafter, prompts, stop=tiny.STOP_ID)
    assert steps == int(state.num_blocks.max())
    # a further step changes nothing of finished rows
    again = step_jit(target, drafter, state, block_size=BLOCK)
    assert outcome(again, prompts) == outcome(state, prompts)
    assert again.kv.lengths.tolist() == state.kv.lengths.tolist()


@pytest.mark.slow
def test_drafts_are_those_of_one_forward_over_the_stored_text(target, drafter, prompts):
    """What the check does on a cache is what decoding does: same features, same context, same block."""

    @jax.jit
    def offline(state):
        zeros = jnp.zeros(BATCH, jnp.int32)
        features = prefill(
            target,
            state.tokens,
            lengths=state.start,
            position_offset=zeros,
            capture_layers=drafter.config.capture_layers,
        ).features
        return jax.vmap(
            lambda f, t, a, n: greedy_tokens(
                draft_blocks(
                    drafter,
                    target.embed_tokens,
                    f,
                    t,
                    a[None],
                    block_lengths=n[None],
                    block_size=BLOCK,
                    position_offset=jnp.int32(0),
                )[0],
                target.head,
            )
        )(features, state.tokens, state.start, jnp.minimum(BLOCK, state.limit - state.start))

    state = begin(target, drafter, prompts, new=np.array([30, 30, 28, 30, 26, 30, 23, 30], np.int32))
    compared = 0
    while not state.done.all():
        drafted, again = np.asarray(draft_jit(target, drafter, state, block_size=BLOCK)), np.asarray(offline(state))
        for row in np.flatnonzero(~np.asarray(state.done)):
            slots = min(BLOCK, int(state.limit[row] - state.start[row])) - 1
            np.testing.assert_array_equal(drafted[row, :slots], again[row, :slots])
            compared += slots
        state = step_jit(target, drafter, state, block_size=BLOCK)
    assert compared > 200


def crafted(wanted, right):
    """Drafted tokens of rows that all stand at their first block: the first `right[row]` ones are the target's."""
    drafted = np.array([greedy[1:BLOCK] for greedy in wanted], np.int32)
    for row, count in enumerate(right):
        if count < BLOCK - 1:
            drafted[row, count] += 1  # the ones behind it stay right, and must not count
    return jnp.asarray(drafted)


@pytest.mark.parametrize(
    ("right", "new", "committed"),
    [
        ([0, 1, 2, 3, 4, 0, 3, 4], 30, [1, 2, 3, 4, 5, 1, 4, 5]),
        # budgets of so many tokens after the first one, already there: right drafts past them do not count
        ([4] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 5, 5]),
        ([1, 1, 1, 1, 3, 3, 3, 0], [2, 3, 4, 2, 4, 5, 6, 2], [1, 2, 2, 1, 3, 4, 4, 1]),
    ],
)
def test_what_a_step_commits_of_given_drafts(target, drafter, prompts, wanted, right, new, committed):
    state = begin(target, drafter, prompts, new=np.array(new, np.int32))
    after = verify_jit(target, drafter, state, crafted(wanted, right))
    rows = outcome(after, prompts)
    assert [sum(blocks) for _, blocks in rows] == committed
    assert [tokens for tokens, _ in rows] == [g[: 1 + n] for g, n in zip(wanted, committed, strict=True)]
    assert after.num_blocks.tolist() == [int(n > 0) for n in committed]
    budgets = np.broadcast_to(new, BATCH)
    assert after.done.tolist() == [1 + n >= budget for n, budget in zip(committed, budgets, strict=True)]
    assert after.kv.lengths.tolist() == after.start.tolist()


def guessed(prompts, texts):
    """Texts by index, each behind its prompt."""
    guesses = np.zeros((BATCH, CAPACITY), np.int32)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        guesses[row, len(prompt) : len(prompt) + len(text)] = text
    return jnp.asarray(guesses)


@pytest.mark.slow
def test_an_oracle_a_liar_and_one_in_between_change_no_token(target, drafter, prompts, wanted):
    right = np.array(wanted)
    state = begin(target, drafter, prompts)
    lies = np.random.default_rng(0).random(right.shape) < 0.4
    for wrong, sizes in ((lies & False, {BLOCK}), (lies | True, {1}), (lies, {1, 2, 3, 4, 5})):
        texts = np.where(wrong, (right + 1) % len(tiny.TOKENS), right)
        rows = outcome(guided_jit(target, drafter, state, guessed(prompts, texts.tolist()), block_size=BLOCK), prompts)
        assert [tokens for tokens, _ in rows] == wanted
        assert {n for _, committed in rows for n in committed[:-1]} == sizes


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_what_a_step_commits_when_a_stop_id_comes(target, drafter, prompts, wanted, at):
    # the stop id as the token of slot `at` + 1 of row 0; in the other rows it may come elsewhere or never
    greedy, stop = [[*row[: BLOCK + 1]] for row in wanted], wanted[0][at + 1]
    state = begin(target, drafter, prompts, stop=stop)
    rows = outcome(verify_jit(target, drafter, state, crafted(wanted, [4, 4, 4, 2, 4, 1, 4, 0])), prompts)
    for row, right in enumerate([4, 4, 4, 2, 4, 1, 4, 0]):
        text = greedy[row][1 : right + 2]
        text = text[: text.index(stop) + 1] if stop in text else text
        expected = (greedy[row][:1], []) if greedy[row][0] == stop else (greedy[row][:1] + text, [len(text)])
        assert rows[row] == expected


def test_a_sequence_whose_first_token_stops_is_done_before_any_block(target, drafter, prompts, wanted):
    state = begin(target, drafter, prompts, stop=wanted[3][0])
    assert state.done.tolist() == [greedy[0] == wanted[3][0] for greedy in wanted]
    assert run(target, drafter, prompts, stop=wanted[3][0])[3] == ([wanted[3][0]], [])


@pytest.mark.slow
def test_verify_does_not_look_at_garbage_past_the_text(target, drafter, prompts):
    """Rows of caches and text past `start` are free: whatever lies there, the next steps are the same."""
    state = step_jit(target, drafter, begin(target, drafter, prompts), block_size=BLOCK)
    rows = np.arange(CAPACITY)[None] >= np.asarray(state.start)[:, None]
    dirty = replace(
        state,
        tokens=jnp.where(jnp.asarray(rows & (rows.cumsum(axis=1) > 1)), 7, state.tokens),
        kv=replace(state.kv, layers=jax.tree_util.tree_map(functools.partial(soil, rows), state.kv.layers)),
        context=jax.tree_util.tree_map(functools.partial(soil, rows), state.context),
    )
    finish = lambda s: outcome(loop_jit(target, drafter, s, block_size=BLOCK), prompts)
    assert finish(dirty) == finish(state)


def soil(rows, buffer):
    return jnp.where(jnp.asarray(rows[:, None, :, None]), jnp.float32(5.0), buffer)
