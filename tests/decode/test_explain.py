"""Where two ways of decoding part: near ties are told from mistakes."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.decode import Decoded, Decoder, Sampling, explain_flip
from support import tiny, tiny_chain

pytestmark = pytest.mark.slow

NEW, BLOCK = 20, 5
SHAPE: dict[str, Any] = {"rows": 1, "prompt_bucket": 64, "max_new_tokens": 20, "block_size": 5}


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


@pytest.fixture(scope="module")
def outcomes(target, drafter, prompts):
    """A prompt's outcome without and with the drafter."""
    decoder = Decoder(target, stop_ids=[], max_new_tokens=NEW, batch_size=1)
    prompt = prompts[2]
    return prompt, decoder.decode([prompt]).rows[0], decoder.decode([prompt], drafter=drafter).rows[0]


def changed(outcome: Decoded, index: int, token: int) -> Decoded:
    return replace(outcome, tokens=[*outcome.tokens[:index], token, *outcome.tokens[index + 1 :]])


def test_equal_outcomes_have_no_flip(target, outcomes):
    prompt, plain, speculative = outcomes
    assert explain_flip(target, prompt, plain, speculative, **SHAPE) is None


@pytest.mark.parametrize("index", [0, 1, 7, NEW - 1])
def test_a_wrong_token_is_not_explained(target, outcomes, index):
    prompt, plain, speculative = outcomes
    wrong = (plain.tokens[index] + 1) % len(tiny.TOKENS)
    flip = explain_flip(target, prompt, plain, changed(speculative, index, wrong), **SHAPE)
    assert flip is not None
    assert (flip.index, flip.plain_token, flip.speculative_token) == (index, plain.tokens[index], wrong)
    assert not flip.explained
    assert not flip.reproduced  # verification, computed again, says what plain decoding says
    assert flip.plain_margin is not None
    assert flip.speculative_margin is not None
    assert flip.plain_margin > 1e-2 > 1e2 * flip.difference_max
    assert flip.speculative_margin == pytest.approx(-flip.plain_margin, abs=1e-4)
    assert 0 <= flip.difference_p50 <= flip.difference_max < 1e-4
    assert flip.difference_here < 1e-4


def test_a_text_of_one_token_can_differ_too(target, outcomes):
    prompt, plain, _ = outcomes
    one = Decoded(tokens=plain.tokens[:1], committed=[], accepted=[], stopped=False)
    flip = explain_flip(target, prompt, one, changed(one, 0, (one.tokens[0] + 1) % len(tiny.TOKENS)), **SHAPE)
    assert flip is not None
    assert (flip.index, flip.difference_max, flip.explained) == (0, 0.0, False)


def test_scores_of_both_ways_are_those_of_decoding(target, outcomes):
    """Each way's argmax at every index is its token: the walk over blocks is the one that was walked."""
    prompt, plain, speculative = outcomes
    assert max(speculative.committed) > 2
    for index in range(1, NEW, 3):
        flip = explain_flip(target, prompt, plain, changed(speculative, index, 0), **SHAPE)
        if plain.tokens[index] != 0:
            assert flip is not None
            assert flip.plain_margin is not None
            assert flip.plain_margin > 0


def test_a_tie_is_explained(target, outcomes):
    """Two tokens of one and the same head row: which one wins is nobody's fault."""
    prompt, plain, speculative = outcomes
    index = 6
    ours = plain.tokens[index]
    other = (ours + 11) % len(tiny.TOKENS)
    head = np.array(target.lm_head)
    head[other] = head[ours]
    tied = eqx.tree_at(lambda t: t.lm_head, target, jnp.asarray(head))
    flip = explain_flip(tied, prompt, plain, changed(speculative, index, other), **SHAPE)
    assert flip is not None
    assert (flip.plain_margin, flip.speculative_margin) == (0.0, 0.0)
    assert flip.explained


def test_samples_are_compared_by_what_decided_them(target, prompts):
    settings = Sampling(temperature=0.8, top_k=5, seed=1)
    decoder = Decoder(target, stop_ids=[], max_new_tokens=NEW, batch_size=1)
    plain = decoder.decode(prompts[:1], sampling=settings, streams=[9]).rows[0]
    told = {"sampling": settings, "stream": 9, **SHAPE}
    margins = []
    for token in range(len(tiny.TOKENS)):
        if token != plain.tokens[4]:
            flip = explain_flip(target, prompts[0], plain, changed(plain, 4, token), **told)
            assert flip is not None
            margins.append(flip.plain_margin)
        if len(margins) == 12:
            break
    # the sample beat every other token, and most were filtered out
    assert all(margin is None or margin > 0 for margin in margins)
    assert None in margins
