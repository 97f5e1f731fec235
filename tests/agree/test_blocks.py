"""Chains over one text: where they part and meet, by hand, and against every pair of chains over a short text."""

import itertools

import numpy as np
import pytest

from dflash_jax.agree.blocks import Parting, compare_chains

TEXT = np.array([9, 9, 9, *range(20, 29)], np.int32)  # a prompt of 3, a response of 9


def compare(offline, committed, *, tokens=None):
    online = TEXT[3:].tolist() if tokens is None else tokens
    return compare_chains(offline, TEXT, prompt_len=3, tokens=online, committed=committed)


def parting(anchor, slot, kind, num_blocks):
    return Parting(anchor=anchor, slot=slot, kind=kind, num_blocks=num_blocks)


def test_equal_chains():
    found = compare({3: 2, 5: 4, 9: 2}, [2, 4, 2])
    assert (found.online, found.num_equal, found.partings) == ((2, 4, 2), 3, ())


def test_they_part_and_meet_again():
    found = compare({3: 2, 5: 1, 6: 3, 9: 2}, [2, 2, 2, 2])
    assert (found.num_equal, found.partings) == (2, (parting(5, 1, "draft", 2),))


def test_another_token_parts_them_for_good():
    tokens = [20, 21, 22, 7, 24, 25, 26, 27, 28]
    # decoding's block at 5 holds the token at index 6, which is its first
    found = compare({3: 2, 5: 4, 9: 2}, [2, 4, 2], tokens=tokens)
    assert (found.num_equal, found.partings) == (1, (parting(5, 1, "token", 2),))


def test_a_draft_and_then_a_token_in_one_block():
    tokens = [20, 21, 22, 23, 7, 25, 26, 27, 28]
    found = compare({3: 2, 5: 1, 6: 3, 9: 2}, [2, 3, 3], tokens=tokens)
    assert (found.num_equal, found.partings) == (1, (parting(5, 1, "draft", 1), parting(5, 2, "token", 1)))


def test_the_first_token_of_all():
    found = compare({3: 2, 5: 4, 9: 2}, [2, 4, 2], tokens=[7, *TEXT[4:].tolist()])
    assert (found.num_equal, found.partings) == (0, (parting(2, 1, "token", 3),))


def test_decoding_that_goes_on_is_cut_where_the_text_ends():
    found = compare({3: 2, 5: 4, 9: 2}, [2, 4, 4, 4], tokens=[*TEXT[3:].tolist(), 1, 2, 3, 4, 5, 6])
    assert (found.online, found.num_equal, found.partings) == ((2, 4, 2), 3, ())


@pytest.mark.parametrize(
    ("committed", "equal", "wanted"),
    [
        # after a block that the replay has, in one that it has longer, at once, in one that it has not
        ([2, 4], 2, (parting(5, 5, "end", 0),)),
        ([2, 3], 1, (parting(5, 4, "end", 1),)),
        ([], 0, (parting(3, 1, "end", 0),)),
        ([1, 3], 0, (parting(3, 1, "draft", 1), parting(4, 4, "end", 1))),
    ],
)
def test_decoding_that_ends_before_the_text(committed, equal, wanted):
    found = compare({3: 2, 5: 4, 9: 2}, committed, tokens=TEXT[3 : 4 + sum(committed)].tolist())
    assert (found.num_equal, found.partings) == (equal, wanted)
    # the first stored token that decoding has not
    assert found.partings[-1].anchor + found.partings[-1].slot == 4 + sum(committed)


def chains(total):
    """Every way to commit `total` tokens in blocks of 1 to 4."""
    if total == 0:
        yield []
    for first in range(1, min(4, total) + 1):
        yield from ([first, *rest] for rest in chains(total - first))


def test_every_pair_of_chains_adds_up_and_equal_blocks_are_those_that_both_have():
    ways = list(chains(8))
    assert len(ways) > 50
    for offline, online in itertools.product(ways[::3], ways[::2]):
        starts = {side: np.cumsum([3, *blocks[:-1]]).tolist() for side, blocks in (("a", offline), ("b", online))}
        replay, decode = (
            dict(zip(starts[side], blocks, strict=True)) for side, blocks in (("a", offline), ("b", online))
        )
        found = compare(replay, online)
        assert found.num_equal == len(replay.items() & decode.items())
        assert found.num_equal + sum(p.num_blocks for p in found.partings) == len(online)
        assert [p.anchor for p in found.partings] == [
            a for a in sorted(replay.keys() & decode.keys()) if replay[a] != decode[a]
        ]
        assert all(p.slot == min(replay[p.anchor], decode[p.anchor]) for p in found.partings)
