"""Every anchor against a plain loop that gives each its own context, in float64, over random tiny models and texts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.accept import AnchorChoice, evaluate_cache
from dflash_jax.core import load_tensors, no_progress, read_json
from dflash_jax.drafter import save_drafter, with_draft_vocabulary
from dflash_jax.nn import head_screen8, head_screen16, make_screen
from oracles import acceptance, blocks
from support import tiny
from support.memory_cache import MemoryCache, random_sequence

VOCAB, HIDDEN, FEATURES, FAR = 5, 24, 48, 70001
# a draw is rarely a tie; where one is nearer than this, float32 may see it the other way
TIE = 1e-5


def some_texts(draw):
    """Texts of every kind: short, longer than a bucket, sampled, far away, with too few tokens after the prompt."""
    shapes = [
        (9, 2, 0, 0),
        (21, 5, 3, 0),
        (70, 51, 1, FAR),
        (17, 1, 0, FAR),
        (26, 6, 6, 3),
        (12, 10, 0, 0),
        (4, 3, 0, 0),
    ]
    return [
        random_sequence(
            draw, length=length, prompt_len=prompt_len, vocab=VOCAB, num_features=FEATURES, departures=departures,
            position_offset=offset, sequence_index=index,
        )
        for index, (length, prompt_len, departures, offset) in enumerate(shapes)
    ]  # fmt: skip


class Case:
    """A random drafter with a small vocabulary, so that it is often right by chance, and texts for it."""

    def __init__(self, folder, *, seed, block_size, max_new_tokens, max_positions, draft_ids=None, **sizes):
        draw = np.random.default_rng(seed)
        config = tiny.tiny_drafter_config(block_size=block_size, vocab_size=VOCAB, mask_token_id=3, **sizes)
        self.draft_ids = draft_ids
        self.drafter = with_draft_vocabulary(
            tiny.random_drafter(config, seed=seed), None if draft_ids is None else np.array(draft_ids)
        )
        save_drafter(self.drafter, folder)
        self.weights = {
            name: weight.astype(np.float64)
            for name, weight in load_tensors(folder / "model.safetensors", what="weights").items()
        }
        self.config = read_json(folder / "config.json", what="config")
        self.embed, self.head = (draw.normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32) for _ in range(2))
        self.texts = some_texts(draw)
        self.max_new_tokens, self.max_positions, self.block_size = max_new_tokens, max_positions, block_size

    def evaluate(self, *, anchors_per_chunk, **settings):
        cache = MemoryCache(self.texts, max_new_tokens=self.max_new_tokens)
        return evaluate_cache(
            self.drafter, jnp.asarray(self.embed), jnp.asarray(self.head), cache, max_positions=self.max_positions,
            block_size=self.block_size, anchors_per_chunk=anchors_per_chunk, position_offsets=None,
            **{"progress": no_progress, **settings},
        )  # fmt: skip

    def alone(self, text, anchor):
        budget = self.max_positions if self.max_new_tokens is None else text.prompt_len + self.max_new_tokens
        return acceptance.at_anchor(
            self.weights, self.config, embed=self.embed.astype(np.float64), head=self.head.astype(np.float64),
            token_ids=text.token_ids.tolist(), next_ids=text.next_ids.tolist(),
            features=text.features.astype(np.float64), anchor=anchor, limit=min(budget, self.max_positions),
            block_size=self.block_size, position_offset=text.position_offset, draft_ids=self.draft_ids,
        )  # fmt: skip


CASES = {
    # the budget ends some texts, the context others
    "two layers": {"seed": 11, "block_size": 4, "max_new_tokens": 15, "max_positions": 69},
    "one layer with biases": {
        "seed": 12, "block_size": 7, "max_new_tokens": None, "max_positions": 1000, "num_layers": 1,
        "attention_bias": True, "num_heads": 4, "num_kv_heads": 1,
    },
    "smallest blocks": {
        "seed": 13, "block_size": 2, "max_new_tokens": 7, "max_positions": 24, "num_layers": 1, "num_heads": 3,
    },
    "sliding layers": {
        "seed": 21, "block_size": 5, "max_new_tokens": None, "max_positions": 1000, "sliding_window": 4,
        "sliding_layers": (1,),
    },
    "a draft vocabulary": {
        "seed": 14, "block_size": 3, "max_new_tokens": 20, "max_positions": 69, "num_layers": 1, "draft_ids": (2, 3, 4),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param("two layers", marks=pytest.mark.slow), "a draft vocabulary"])
def test_a_screen_of_the_head_is_asked_and_changes_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(head_screen16, "COLUMNS_PER_SCREEN_PART", 1)
    monkeypatch.setattr(head_screen16, "CANDIDATES", 2)
    monkeypatch.setattr(head_screen8, "COLUMNS_PER_PART8", 1)
    monkeypatch.setattr(head_screen8, "PARTS_TRIED", 2)
    case = Case(tmp_path, **CASES[name])
    screen = make_screen(jnp.asarray(case.head))
    nothing = jax.tree.map(jnp.zeros_like, screen)  # as if no logit could be above 0
    plain, screened, misled = (
        [result.accepted.tolist() for result in case.evaluate(anchors_per_chunk=16, screen=one)]
        for one in (None, screen, nothing)
    )
    assert screened == plain
    assert misled != plain


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("smallest blocks", "a draft vocabulary")))
        for name in CASES
    ],
)
def test_every_anchor_is_what_it_is_alone(name, tmp_path):
    case = Case(tmp_path, **CASES[name])
    per_chunk = {"two layers": 16, "one layer with biases": 11}.get(name, 64)
    results = {result.sequence_index: result for result in case.evaluate(anchors_per_chunk=per_chunk)}
    checked, near_ties, seen = 0, 0, set()
    assert 6 not in results  # one response token: no anchor
    for index, text in enumerate(case.texts[:6]):
        result = results[index]
        assert result.anchors.tolist() == blocks.eligible(text.prompt_len, len(text.token_ids))
        for row, anchor in enumerate(result.anchors.tolist()):
            accepted, hits, labelled, margin = case.alone(text, anchor)
            assert result.labelled[row].tolist() == labelled
            if margin < TIE:
                near_ties += 1
                continue
            assert (result.correct[row].tolist(), result.accepted[row]) == (hits, accepted)
            seen.add(accepted)
            checked += 1
        walked = acceptance.replay(result.accepted.tolist(), prompt_len=text.prompt_len, length=len(text.token_ids))
        assert result.committed[result.on_chain].tolist() == walked
        departed = [int(text.token_ids[i] != text.next_ids[i - 1]) for i in range(text.prompt_len, len(text.token_ids))]
        assert result.num_departures == sum(departed)
    assert sum(result.num_departures for result in results.values()) == 10
    assert checked > 60
    assert near_ties <= 1
    if case.draft_ids is not None:
        drafted = [text.next_ids[results[index].anchors] for index, text in enumerate(case.texts[:6])]
        first = np.concatenate([results[index].correct[:, 0] for index in range(6)])
        outside = ~np.isin(np.concatenate(drafted), case.draft_ids)
        assert outside.sum() > 20  # labels that cannot be drafted
        assert not first[outside].any()
    assert seen >= set(range(min(case.block_size, 3)))


@pytest.mark.slow
def test_choice_packing_and_order_change_nothing(tmp_path):
    case = Case(tmp_path, **CASES["two layers"])
    every = {result.sequence_index: result for result in case.evaluate(anchors_per_chunk=16)}
    moves = []
    some = case.evaluate(
        anchors_per_chunk=8, tokens_per_batch=64, anchors=AnchorChoice(kind="random", number=5, seed=2),
        progress=lambda *move: moves.append(move),
    )  # fmt: skip
    assert [result.sequence_index for result in some] == [0, 1, 2, 3, 4, 5]
    assert moves[-1] == (6, 6, "26 anchors")
    for result in some:
        at = np.isin(every[result.sequence_index].anchors, result.anchors)
        assert at.sum() == min(5, len(every[result.sequence_index].anchors))
        for name in ("anchors", "accepted", "correct", "labelled"):
            assert (getattr(every[result.sequence_index].at(at), name) == getattr(result, name)).all()
        assert (result.on_chain is None) == (len(result.anchors) < len(every[result.sequence_index].anchors))


@pytest.mark.slow
def test_features_behind_an_anchor_are_never_read(tmp_path):
    """A text whose last features are unknown ends, for anchors, where they do; what stands there changes nothing."""
    case = Case(tmp_path, **CASES["two layers"])
    whole = {result.sequence_index: result for result in case.evaluate(anchors_per_chunk=16)}
    text = case.texts[1]
    features = text.stored_features.copy()
    features[15:] = 1000
    case.texts = [replace(text, stored_features=features, features_len=15)]
    (cut,) = case.evaluate(anchors_per_chunk=16)
    assert cut.anchors.tolist() == list(range(5, 16))
    same = whole[1].at(np.isin(whole[1].anchors, cut.anchors))
    assert cut.accepted.tolist() == same.accepted.tolist()
    assert cut.length == 17
