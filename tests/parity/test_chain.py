"""What an engine accepts, against a plain float64 drafter per anchor and against the check's own evaluation."""

import shutil

import numpy as np
import pytest

from dflash_jax.accept import evaluate_cache
from dflash_jax.cache import open_cache
from dflash_jax.core import InputError, load_tensors, no_progress, read_json, write_json
from dflash_jax.drafter import load_drafter, with_draft_vocabulary
from dflash_jax.parity import ParityConfig
from dflash_jax.parity.chain import Chain, Run
from dflash_jax.parity.engine import Engine
from dflash_jax.parity.texts import load_texts, make_batches
from dflash_jax.targets import load_target
from oracles import blocks
from support import tiny
from support.parity_world import FAR, NEW_TOKENS

# the world of these tests takes long to make
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(world):
    return Chain(load_target(world.target), load_drafter(world.drafter), block_size=5, anchors_per_chunk=32)


def engine_of(world, **settings):
    config = ParityConfig(target=world.target, drafter=world.drafter, responses=world.responses, **settings)
    return Engine(config=config, offsets=(0, 4096))


def drafted_in_float64(world, chain, cached, anchor, slots, *, context_start, block_shift):
    weights = load_tensors(world.drafter / "model.safetensors", what="weights")
    embed, head = (np.asarray(part, np.float64) for part in (chain.target.embed_tokens, chain.target.head))
    hidden = blocks.draft_block(
        {name: weight.astype(np.float64) for name, weight in weights.items()},
        read_json(world.drafter / "config.json", what="config"),
        slots=embed[[cached.token_ids[anchor], *[chain.drafter.config.mask_token_id] * (slots - 1)]],
        features=np.asarray(cached.features[:anchor], np.float64),
        first_position=context_start,
        block_shift=block_shift,
    )
    return np.argmax(hidden[1:] @ head.T, axis=-1).tolist()


@pytest.mark.parametrize(
    ("settings", "context_start", "block_shift"),
    [({"block_shift": 1}, 4096, 1), ({"drafter_positions": "block-ignores-offset"}, 4096, -4096)],
)
def test_every_anchor_is_drafted_where_the_engine_places_it(world, chain, settings, context_start, block_shift):
    engine = engine_of(world, **settings)
    texts = load_texts(engine.config, chain.target, cache=None, offsets=engine.offsets, progress=no_progress)[:2]
    (batch,) = make_batches(texts, tokens_per_batch=128)
    cache = open_cache(world.cache("plain"))
    stored = {
        tuple(sequence.token_ids): sequence
        for sequence in map(cache.sequence, range(cache.num_sequences))
        if sequence.position_offset == 4096
    }
    seen = set()
    for one, outcome in zip(batch.texts, Run(chain, batch).outcomes(engine.links(4096)), strict=True):
        cached = stored[tuple(one.token_ids)]
        for row, anchor in enumerate(range(one.prompt_len, len(one.token_ids) - 1)):
            slots, labels = blocks.labels(
                one.token_ids.tolist(), cached.next_ids.tolist(), length=len(one.token_ids), limit=one.limit,
                anchor=anchor, block_size=5,
            )  # fmt: skip
            known = [label for label in labels if label is not None]
            drafted = drafted_in_float64(
                world, chain, cached, anchor, slots, context_start=context_start, block_shift=block_shift
            )
            assert outcome.accepted[row] == blocks.accept_len(drafted[: len(known)], known, len(known))
            assert outcome.labelled[row].tolist() == [label is not None for label in labels]
            seen.add(int(outcome.accepted[row]))
    assert len(seen) >= 3


@pytest.mark.parametrize("reduced", [False, True])
def test_a_sound_engine_accepts_what_the_check_says(world, chain, reduced):
    cache = open_cache(world.cache("plain"))
    # all but some labels of the first text
    ids = np.setdiff1d(np.arange(len(tiny.TOKENS)), cache.sequence(0).next_ids[-12:-8])
    if reduced:
        drafter = with_draft_vocabulary(chain.drafter, ids)
        chain = Chain(chain.target, drafter, block_size=5, anchors_per_chunk=32)
    wanted = evaluate_cache(
        chain.drafter, chain.target.embed_tokens, chain.target.head, cache, max_positions=tiny.CONTEXT, block_size=5,
        anchors_per_chunk=16, position_offsets=(FAR,), progress=no_progress,
    )  # fmt: skip
    engine = engine_of(world)
    texts = load_texts(engine.config, chain.target, cache=None, offsets=engine.offsets, progress=no_progress)
    found = {}
    for batch in make_batches(texts, tokens_per_batch=128):
        for one, outcome in zip(batch.texts, Run(chain, batch).outcomes(engine.reference), strict=True):
            found[one.prompt_hash] = outcome
    if reduced:
        (first,) = (result for result in wanted if result.prompt_hash == cache.sequence(0).prompt_hash)
        outside = ~np.isin(cache.sequence(0).next_ids[first.anchors], ids)
        assert outside.sum() >= 4
        assert not first.correct[outside, 0].any()
    assert len(found) == len(wanted) == 8
    for result in wanted:
        assert found[result.prompt_hash].accepted.tolist() == result.accepted.tolist()
        assert found[result.prompt_hash].correct.tolist() == result.correct.tolist()
        assert found[result.prompt_hash].labelled.tolist() == result.labelled.tolist()


def test_layers_and_their_neighbours_are_columns_of_one_forward(world, chain):
    engine = engine_of(world)
    texts = load_texts(engine.config, chain.target, cache=None, offsets=engine.offsets, progress=no_progress)[:3]
    (batch,) = make_batches(texts, tokens_per_batch=192)
    every = np.split(
        np.asarray(chain.prefill(batch, kind="exact", offset=0, layers=(0, 1, 2, 3, 4)).features), 5, axis=-1
    )
    source = engine.reference.features
    for shift in (-1, 0, 1):
        wanted = np.concatenate([every[layer + shift] for layer in tiny.CAPTURE_LAYERS], axis=-1)
        moved = chain.capture(batch, type(source)(kind="exact", offset=0, layer_shift=shift))
        assert np.abs(np.asarray(moved.features) - wanted).max() < 1e-5
    assert [chain.has_layers(shift) for shift in (-2, -1, 1, 2)] == [True, True, True, False]


def test_generated_responses_are_those_of_the_responses_command(world, chain):
    """In the prompts' order, whatever order they were decoded in; and the same at any offset."""
    engine = Engine(
        config=ParityConfig(
            target=world.target, drafter=world.drafter, prompts=str(world.prompts), max_new_tokens=NEW_TOKENS
        ),
        offsets=(4096,),
    )
    given, generated = (
        load_texts(one.config, chain.target, cache=None, offsets=one.offsets, progress=no_progress)
        for one in (engine_of(world), engine)
    )
    assert [one.token_ids.tolist() for one in generated] == [one.token_ids.tolist() for one in given]
    assert [(one.prompt_len, one.prompt_hash, one.limit, one.prompt_set) for one in generated] == [
        (one.prompt_len, one.prompt_hash, one.limit, one.prompt_set) for one in given
    ]


def refused(world, message, **settings):
    with pytest.raises(InputError, match=message) as error:
        world.parity(**settings)
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line(tmp_path, world):
    cache = world.cache("plain")
    refused(
        world, r"^--position-offsets names 7: .*cache-plain holds 0, 4096, 65536$", cache=cache, position_offsets=(7,)
    )
    narrow = world.cache("narrow", capture_layers=(1,), position_offsets=(0,))
    refused(world, r"^.*cache-narrow holds features of 24 columns, the drafter .* reads 48$", cache=narrow)
    refused(world, "^no cache at .*gone", cache=tmp_path / "gone")
    refused(world, "^no drafter folder at .*gone$", drafter=tmp_path / "gone")
    refused(world, "^--block-size is 6: the drafter was trained for blocks of 5, at most that$", block_size=6)
    refused(world, "^at offset 0 the engine's positions begin at -1: shift the other one", block_shift=-1)
    refused(world, r"^--position-offsets 2147483640 \+ the longest text's", position_offsets=(0, 2147483640))
    (tmp_path / "short.jsonl").write_text('{"id": "a", "prompt_ids": [5, 6], "response_ids": [7]}\n')
    refused(world, "^no text has a response of two tokens or more", responses=tmp_path / "short.jsonl")


def test_a_drafter_that_does_not_fit_is_named(tmp_path, world):
    drafter = shutil.copytree(world.drafter, tmp_path / "drafter")
    config = read_json(drafter / "config.json", what="config")
    write_json(drafter / "config.json", config | {"vocab_size": 54})
    refused(world, "^the drafter .* does not fit the target: vocab_size is 54, the target's is 53$", drafter=drafter)
