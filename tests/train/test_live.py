"""Features computed in the step are those of a cache, and sequences come in an order that the seed alone decides."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dflash_jax.cache import open_cache, read_responses, stack_sequences
from dflash_jax.check import CheckConfig, check
from dflash_jax.core import InputError
from dflash_jax.targets import load_target, read_target_config
from dflash_jax.train import TrainConfig, train
from dflash_jax.train.init import drafter_config, new_drafter
from dflash_jax.train.live import LiveSource, draw_offset, live_sequences, make_live_step, open_live
from dflash_jax.train.offsets import Offsets, parse_offsets
from dflash_jax.train.step import make_step, new_state
from support import tiny, tiny_chain


@pytest.fixture(scope="module")
def responses(cache):
    return cache.parent / "responses.jsonl"


def live_config(target, responses, out, **changes):
    """A live run of one layer."""
    config = tiny_chain.train_config(target, None, out, features="live", responses=responses, num_layers=1)
    return dataclasses.replace(config, capture_layers=tiny.CAPTURE_LAYERS, **changes)


def source(responses, target, **changes):
    settings = {"capture_layers": tiny.CAPTURE_LAYERS, "offsets": Offsets(fixed=(0,), largest=0), "fingerprint": {}}
    return open_live(responses, target=read_target_config(target), **settings | changes)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
def test_a_live_step_equals_a_cached_one(loss, tmp_path, target_folder, responses):
    """On the same batch, at an offset, with a cache of the same texts built by the package."""
    offset, soft = 4096, {"top_k": 5} if loss == "kl" else {}
    built = tiny_chain.build_cache(tmp_path / "cache", target_folder, responses, position_offsets=(offset,), **soft)
    target = load_target(target_folder)
    config = tiny_chain.train_config(target_folder, built, tmp_path / "run", sequences_per_step=8, loss=loss)
    shape = drafter_config(
        target, capture_layers=tiny.CAPTURE_LAYERS, num_layers=1, block_size=5, mask_token_id=tiny.MASK_ID
    )

    def fresh():
        return new_state(new_drafter(shape, target, init="target", key=jax.random.key(0)), config)

    live = source(responses, target_folder, offsets=Offsets(fixed=(offset,), largest=offset))
    texts = live.batches(sequences_per_step=8, max_positions=160, seed=0, mesh=None)(0)
    stored = cached_batch(built, texts)
    step = make_step(config)
    expected = step(fresh(), target.embed_tokens, target.head, stored)[1]
    told = dataclasses.replace(config, features="live", cache=None, responses=responses, **soft)
    live_step = make_live_step(make_step(told), told, capture_layers=live.capture_layers)
    result = live_step(fresh(), target, texts)[1]
    # measured: equal to the last bit or 2e-7
    assert float(result.statistics.loss) == pytest.approx(float(expected.statistics.loss), rel=1e-6)
    assert float(result.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-5)
    assert int(result.statistics.num_labels) == int(expected.statistics.num_labels) > 100
    assert texts.position_offset.tolist() == stored.position_offset.tolist() == [offset] * 8
    made = live_sequences(target, texts, capture_layers=live.capture_layers)
    real = np.arange(stored.token_ids.shape[1])[None] < np.asarray(stored.length)[:, None]
    assert (np.asarray(made.next_ids) == np.asarray(stored.next_ids))[real].all()
    assert np.abs(np.asarray(made.features) - np.asarray(stored.features))[real].max() < 1e-5 * 10


def cached_batch(built, texts):
    """The cache's sequences in the order of a live batch."""
    opened = open_cache(built)
    by_text = {}
    for index in range(opened.num_sequences):
        sequence = opened.sequence(index)
        by_text[tuple(sequence.token_ids.tolist())] = sequence
    lengths = np.asarray(texts.length)
    wanted = [tuple(row[:n].tolist()) for row, n in zip(np.asarray(texts.token_ids), lengths, strict=True)]
    budget = opened.manifest["max_new_tokens"]
    return stack_sequences([by_text[text] for text in wanted], width=texts.token_ids.shape[1], max_new_tokens=budget)


def test_every_epoch_has_every_row_at_every_listed_offset(target_folder, responses):
    live = source(responses, target_folder, offsets=Offsets(fixed=(0, 4096), largest=4096))
    batches = live.batches(sequences_per_step=4, max_positions=60, seed=1, mesh=None)
    for epoch in range(2):
        seen = set()
        for step in range(4 * epoch, 4 * epoch + 4):
            batch = batches(step)
            texts = zip(np.asarray(batch.token_ids), batch.length.tolist(), batch.position_offset.tolist(), strict=True)
            seen |= {(tuple(row[:length].tolist()), offset) for row, length, offset in texts}
            assert batch.limit.tolist() == [min(p + 24, 60) for p in batch.prompt_len.tolist()]
        assert len(seen) == 16
        assert {offset for _, offset in seen} == {0, 4096}


def test_drawn_offsets_depend_on_seed_and_element_alone():
    draws = [draw_offset(999, seed=3, element=element) for element in range(2000)]
    assert draws == [draw_offset(999, seed=3, element=element) for element in range(2000)]
    assert min(draws) < 5
    assert 994 < max(draws) <= 999
    # four standard errors of the mean of 2000 draws
    assert abs(np.mean(draws) - 499.5) < 4 * 289 / np.sqrt(2000)
    assert draws[:50] != [draw_offset(999, seed=4, element=element) for element in range(50)]
    assert draw_offset(0, seed=3, element=1) == 0


@pytest.mark.slow
def test_a_live_run_is_recorded_resumed_and_checked(tmp_path, target_folder, cache, responses):
    settings = {"steps": 6, "checkpoint_every": 3, "position_offsets": "random:1000"}
    config = live_config(target_folder, responses, tmp_path / "run", **settings)
    said = train(config)
    record = json.loads((tmp_path / "run" / "run-6" / "record.json").read_text())
    rows = read_responses(responses, vocab_size=53, max_length=160)
    assert record["trained_prompt_hashes"] == sorted({f"{value:016x}" for value in rows.prompt_hash.tolist()})
    assert record["responses_sha256"] == rows.sha256
    # the check of a cache with the same target and layers takes it, and knows its prompts
    checked = check(CheckConfig(target=target_folder, cache=cache, drafter=tmp_path / "run" / "run-6"))
    assert checked["seen"]["num_prompts"] == said["num_prompts"] == 8
    assert checked["unseen"] is None
    before = (tmp_path / "run" / "run-6" / "model.safetensors").read_bytes()
    # back to step 3, and on
    shutil.rmtree(tmp_path / "run" / "state" / "6")
    again = train(dataclasses.replace(config, resume=True))
    assert again["steps_this_run"] == 3
    assert (tmp_path / "run" / "run-6" / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match=r"position_offsets was 'random:1000', now '0'"):
        train(dataclasses.replace(config, resume=True, position_offsets="0"))


@pytest.mark.parametrize(
    ("text", "offsets"),
    [("0", ((0,), 0)), ("0,4096", ((0, 4096), 4096)), ("random:131072", ((), 131072)), ("random:0", ((), 0))],
)
def test_offsets_are_read(text, offsets):
    assert (parse_offsets(text).fixed, parse_offsets(text).largest) == offsets


@pytest.mark.parametrize("text", ["", "random:", "random:1,2", "-1", "0,0", "far", "1.5"])
def test_bad_offsets_are_named(text):
    with pytest.raises(InputError, match=rf"--position-offsets is '{text}': give different positions such as 0,4096"):
        parse_offsets(text)


def test_positions_end_before_2_to_the_31(target_folder, responses):
    with pytest.raises(InputError, match=r"positions go from 0 to 2147483647$"):
        parse_offsets("random:2147483648")
    with pytest.raises(InputError, match=r"--position-offsets reaches 2147483647: the longest sequence ends past"):
        source(responses, target_folder, offsets=parse_offsets("random:2147483647"))
    with pytest.raises(InputError, match=r"--capture-layers names 5: the target's layers are 0 to 4$"):
        source(responses, target_folder, capture_layers=(1, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"--features cached needs --cache, and no --responses$"),
        ({"features": "live"}, r"--features live needs --responses, and no --cache$"),
        ({"features": "live", "cache": Path("c")}, r"--features live needs --responses, and no --cache$"),
        ({"cache": Path("c"), "responses": Path("r")}, r"--features cached needs --cache, and no --responses$"),
        (
            {"cache": Path("c"), "capture_layers": (1,)},
            r"--capture-layers and --position-offsets are the cache's: give them",
        ),
        ({"cache": Path("c"), "position_offsets": "5"}, r"--capture-layers and --position-offsets are the cache's"),
    ],
)
def test_a_run_has_one_source(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"^{message}"):
        TrainConfig(target=tmp_path, out=tmp_path, **changes)


def test_the_fingerprint_is_that_of_a_cache(target_folder, responses):
    live = source(responses, target_folder, fingerprint={"target_weights": "w"})
    assert isinstance(live, LiveSource)
    rope = read_target_config(target_folder).rope.to_json()
    assert live.fingerprint == {"target_weights": "w", "rope": rope, "capture_layers": [1, 3]}


def test_top_k_is_of_live_kl_alone(tmp_path, target_folder, responses, cache):
    config = live_config(target_folder, responses, tmp_path / "run", loss="kl")
    assert config.live_top_k == 32
    assert dataclasses.replace(config, loss="cross-entropy").live_top_k == 0
    cached = {"features": "cached", "responses": None, "cache": cache, "capture_layers": None}
    for given in ({"loss": "cross-entropy"}, cached):
        with pytest.raises(InputError, match="--top-k is the cache's, and of --loss kl alone"):
            dataclasses.replace(config, top_k=4, **given)
