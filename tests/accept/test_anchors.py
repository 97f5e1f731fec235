"""Which anchors are chosen."""

import hashlib
import struct

import numpy as np
import pytest

from dflash_jax.accept import AnchorChoice, hash_text, parse_anchors
from dflash_jax.core import InputError

TEXT = hash_text(np.array([5, 6, 7], np.int32))


def chosen(text, *, prompt_len=3, length=40, text_hash=TEXT, seed=0):
    return parse_anchors(text, seed=seed).choose(prompt_len=prompt_len, length=length, text_hash=text_hash).tolist()


def test_all_and_every():
    assert chosen("all", length=9) == [3, 4, 5, 6, 7]
    assert chosen("every:1", length=9) == [3, 4, 5, 6, 7]
    assert chosen("every:2", length=9) == [3, 5, 7]
    assert chosen("every:9", length=9) == [3]
    # a response of one token has no anchor
    assert [chosen(form, length=4) for form in ("all", "every:2", "random:3")] == [[], [], []]


def test_random_is_some_of_them_by_seed_and_text():
    some = chosen("random:7")
    assert some == chosen("random:7")
    assert some == sorted(set(some))
    assert len(some) == 7
    assert set(some) <= set(range(3, 39))
    assert some != chosen("random:7", seed=1)
    assert some != chosen("random:7", text_hash=hash_text(np.array([5, 6, 8], np.int32)))
    assert chosen("random:36") == chosen("random:99") == list(range(3, 39))
    # every anchor is as likely as any other
    counts = np.bincount(np.concatenate([chosen("random:6", seed=seed) for seed in range(300)]), minlength=39)[3:]
    assert abs(counts - 300 * 6 / 36).max() < 5 * np.sqrt(50)


def test_a_text_s_hash_is_of_its_ids():
    digest = hashlib.blake2b(struct.pack("<3i", 5, 6, 7), digest_size=8).digest()
    assert struct.unpack("<Q", digest) == (TEXT,)
    assert hash_text(np.array([5, 6], np.int32)) != TEXT != hash_text(np.array([7, 6, 5], np.int32))


def test_a_choice_is_written_as_it_is_read():
    for text in ("all", "every:3", "random:64"):
        assert str(parse_anchors(text)) == text
    assert parse_anchors("random:2", seed=4) == AnchorChoice(kind="random", number=2, seed=4)


@pytest.mark.parametrize(
    "text", ["", "some", "every", "every:0", "random:-1", "random:1.5", "every: 2", "all:1", "random:"]
)
def test_another_choice_is_refused(text):
    with pytest.raises(InputError, match="--anchors is .*: choose all, every:N or random:N, with N from 1 up"):
        parse_anchors(text)
