"""The drafter's forward: against numpy loops, against itself one block at a time, and what it must not look at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.core import load_tensors, read_json
from dflash_jax.drafter import draft_blocks, save_drafter
from oracles import blocks
from support import tiny

SEQ, BLOCK = 17, 5
ANCHORS = [1, 4, 5, 11, 16]
LENGTHS = [5, 5, 3, 5, 2]


def inputs(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "embed_tokens": jnp.asarray(draw.normal(0, 1, (len(tiny.TOKENS), 24)), jnp.float32),
        "features": jnp.asarray(draw.normal(0, 1, (SEQ, 48)), jnp.float32),
        "token_ids": jnp.asarray(draw.integers(4, len(tiny.TOKENS), SEQ), jnp.int32),
    }


@functools.partial(jax.jit, static_argnames=("block_size",))
def forward(drafter, embed_tokens, features, token_ids, anchors, block_lengths, position_offset, *, block_size=BLOCK):
    return draft_blocks(
        drafter,
        embed_tokens,
        features,
        token_ids,
        anchors,
        block_lengths=block_lengths,
        block_size=block_size,
        position_offset=position_offset,
    )


def run(drafter, values, *, anchors=ANCHORS, lengths=LENGTHS, offset=0, block_size=BLOCK):
    anchors, lengths = jnp.asarray(anchors, jnp.int32), jnp.asarray(lengths, jnp.int32)
    return np.asarray(
        forward(
            drafter,
            values["embed_tokens"],
            values["features"],
            values["token_ids"],
            anchors,
            lengths,
            jnp.int32(offset),
            block_size=block_size,
        )
    )


def existing(out, lengths=LENGTHS):
    """Drafted slots that exist, one array per block: the others mean nothing."""
    return [block[: length - 1] for block, length in zip(out, lengths, strict=True)]


@pytest.mark.parametrize("attention_bias", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_block_is_that_of_float64_loops(tmp_path, attention_bias):
    drafter = tiny.random_drafter(tiny.tiny_drafter_config(attention_bias=attention_bias))
    save_drafter(drafter, tmp_path)
    config = read_json(tmp_path / "config.json", what="config")
    weights = {n: t.astype(np.float64) for n, t in load_tensors(tmp_path / "model.safetensors", what="weights").items()}
    values, offset = inputs(), 90
    embed = np.asarray(values["embed_tokens"])
    for block, anchor, length in zip(run(drafter, values, offset=offset), ANCHORS, LENGTHS, strict=True):
        ids = [int(values["token_ids"][anchor]), *[tiny.MASK_ID] * (length - 1)]
        wanted = blocks.draft_block(
            weights,
            config,
            slots=embed[ids],
            features=np.asarray(values["features"][:anchor], np.float64),
            first_position=offset,
        )
        # measured 2e-6 on values up to 4
        np.testing.assert_allclose(block[: length - 1], wanted[1:], atol=2e-5)


@pytest.mark.slow
def test_one_anchor_at_a_time_gives_the_same():
    drafter, values = tiny.random_drafter(tiny.tiny_drafter_config()), inputs()
    together = existing(run(drafter, values))
    for block, anchor, length in zip(together, ANCHORS, LENGTHS, strict=True):
        alone = run(drafter, values, anchors=[anchor], lengths=[length])
        np.testing.assert_allclose(block, alone[0, : length - 1], atol=1e-5)


def test_a_shorter_block_is_a_smaller_block_size():
    drafter, values = tiny.random_drafter(tiny.tiny_drafter_config()), inputs()
    cut = run(drafter, values, anchors=[7], lengths=[3])[0, :2]
    np.testing.assert_allclose(cut, run(drafter, values, anchors=[7], lengths=[3], block_size=3)[0], atol=1e-5)
    whole = run(drafter, values, anchors=[7], lengths=[5])[0, :2]
    assert np.abs(cut - whole).max() > 1e-2  # the slots that do not exist would have been seen


def test_what_lies_at_and_after_the_anchor_changes_nothing_bit_for_bit():
    drafter, values = tiny.random_drafter(tiny.tiny_drafter_config()), inputs()
    before = existing(run(drafter, values))
    for row, anchor in enumerate(ANCHORS):
        changed = values | {
            "features": values["features"].at[anchor:].add(3.0),
            "token_ids": values["token_ids"].at[anchor + 1 :].set(4),
        }
        np.testing.assert_array_equal(existing(run(drafter, changed))[row], before[row])
    # the same with another anchor list: other blocks are not seen
    moved = existing(run(drafter, values, anchors=[1, 2, 9, 11, 16]))
    for row in (0, 3, 4):
        np.testing.assert_array_equal(moved[row], before[row])


def test_padding_that_is_not_a_number_like_the_rest_changes_nothing():
    drafter, values = tiny.random_drafter(tiny.tiny_drafter_config()), inputs()
    wild = values | {"features": values["features"].at[12:].set(1e30), "token_ids": values["token_ids"].at[12:].set(0)}
    for ours, theirs in zip(
        existing(run(drafter, values))[:4], existing(run(drafter, wild))[:4], strict=True
    ):  # anchors up to 11
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("row", range(1, len(ANCHORS)))
def test_every_feature_before_the_anchor_and_the_anchor_s_token_count(row):
    drafter, values = tiny.random_drafter(tiny.tiny_drafter_config()), inputs()
    before = run(drafter, values)[row, :1]
    anchor = ANCHORS[row]
    for index in {0, anchor - 1}:
        changed = values | {"features": values["features"].at[index].add(3.0)}
        assert (np.abs(run(drafter, changed)[row, :1] - before).max(axis=-1) > 1e-4).all()
    other = values | {"token_ids": values["token_ids"].at[anchor].set(tiny.STOP_ID)}
    assert (np.abs(run(drafter, other)[row, :1] - before).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize("offset", [4096, 131072, 2**31 - 1 - SEQ - BLOCK])
def test_shifting_all_positions_changes_nothing(offset):
    drafter, values = tiny.random_drafter(tiny.tiny_drafter_config()), inputs()
    near, far = existing(run(drafter, values)), existing(run(drafter, values, offset=offset))
    for a, b in zip(near, far, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # measured 2e-6
