"""Sampled decoding: the target's distribution exactly, the same tokens with a drafter as without, in any batch."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dflash_jax.core import InputError, save_tensors
from dflash_jax.decode import (
    Decoder,
    Sampler,
    Sampling,
    choose_tokens,
    engine,
    speculative_loop,
    start_decoding,
    token_keys,
)
from dflash_jax.targets import load_target, open_mesh, prefill, read_target_config, tensor_shapes
from oracles import sampling
from support import tiny, tiny_chain

MAX_NEW = 38  # as in tests/decode/test_engine.py: the same shapes are compiled once
SETTINGS = [Sampling(temperature=0.7, seed=3), Sampling(temperature=1.1, top_k=9, top_p=0.8, seed=4)]


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


@pytest.fixture(scope="module")
def decoder(target):
    return Decoder(target, stop_ids=[tiny.STOP_ID], max_new_tokens=MAX_NEW, batch_size=3)


@pytest.mark.parametrize(
    ("settings", "block_size"),
    [(SETTINGS[0], 5), pytest.param(SETTINGS[1], 3, marks=pytest.mark.slow)],
    ids=["all", "filtered"],
)
def test_a_drafter_changes_no_sample(decoder, drafter, prompts, settings, block_size):
    plain, greedy, sizes = [], [], []
    for first in (0, 3, 6):
        batch, streams = prompts[first : first + 3], range(first, min(first + 3, 8))
        plain += [row.tokens for row in decoder.decode(batch, sampling=settings, streams=streams).rows]
        greedy += [row.tokens for row in decoder.decode(batch).rows]
        rows = decoder.decode(batch, drafter=drafter, block_size=block_size, sampling=settings, streams=streams).rows
        assert [row.tokens for row in rows] == plain[first:]
        sizes += [(n, m) for row in rows for n, m in zip(row.committed, row.accepted, strict=True)]
    assert {n for n, _ in sizes} >= {1, 2, 3}  # else the law would prove little
    assert all(n - 1 <= m <= n for n, m in sizes)
    assert sum(a == b for a, b in zip(plain, greedy, strict=True)) <= 2
    assert len({tuple(tokens) for tokens in plain}) == len(prompts)


@pytest.mark.slow
def test_a_row_s_samples_do_not_hang_on_its_batch(target, decoder, drafter, prompts):
    settings = SETTINGS[1]
    together = decoder.decode(prompts[:3], drafter=drafter, sampling=settings, streams=[11, 12, 13]).rows
    turned = decoder.decode(prompts[2::-1], drafter=drafter, sampling=settings, streams=[13, 12, 11]).rows
    assert turned[::-1] == together
    # alone, in a wider bucket, of a longer budget, far away
    other = Decoder(target, stop_ids=[tiny.STOP_ID], max_new_tokens=MAX_NEW + 9, batch_size=1, prompt_bucket=128)
    alone = other.decode([prompts[1]], drafter=drafter, sampling=settings, streams=[12], position_offset=2**20).rows[0]
    assert alone.tokens[: len(together[1].tokens)] == together[1].tokens
    # and it is the stream and the seed that tell rows apart
    same = decoder.decode([prompts[1]] * 3, sampling=settings, streams=[12, 12, 5]).rows
    assert same[0] == same[1]
    assert same[0].tokens != same[2].tokens
    reseeded = Sampling(temperature=1.1, top_k=9, top_p=0.8, seed=5)
    assert decoder.decode([prompts[1]], sampling=reseeded, streams=[12]).rows[0].tokens != same[0].tokens


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "model=2"])
def test_samples_are_the_same_on_a_mesh(decoder, prompts, mesh):
    folder = tiny.tiny_target()
    split = load_target(folder, mesh=open_mesh(read_target_config(folder), mesh))
    over = Decoder(split, stop_ids=[tiny.STOP_ID], max_new_tokens=MAX_NEW, batch_size=4)
    for settings in SETTINGS:
        wanted = decoder.decode(prompts[:3], sampling=settings, streams=[7, 8, 9]).rows
        assert over.decode(prompts[:3], sampling=settings, streams=[7, 8, 9]).rows == wanted


@pytest.mark.slow
def test_rows_have_settings_of_their_own(target, decoder, drafter, prompts):
    """A `Sampler` holds a row's own temperature; a row of k = 1 is a greedy one among sampled ones."""
    start = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))
    loop = jax.jit(speculative_loop, static_argnames=("block_size",))
    tokens = np.zeros((3, 64), np.int32)
    lengths = np.array([len(prompts[2])] * 3, np.int32)
    tokens[:, : lengths[0]] = prompts[2]
    sampler = Sampler(
        temperature=jnp.array([0.7, 1.5, 0.7], jnp.float32),
        top_k=jnp.array([53, 1, 53], jnp.int32),
        top_p=None,
        seed=jnp.array([3, 3, 3], jnp.int32),
        stream=jnp.array([2, 2, 2], jnp.int32),
    )
    state = start(
        target, drafter, jnp.asarray(tokens), jnp.asarray(lengths), position_offset=jnp.zeros(3, jnp.int32),
        limit=jnp.asarray(lengths + MAX_NEW), stop_ids=jnp.array([tiny.STOP_ID], jnp.int32), capacity=128,
        max_new_tokens=MAX_NEW, sampler=sampler,
    )  # fmt: skip
    done = loop(target, drafter, state, block_size=5)
    rows = [np.asarray(done.tokens)[row, lengths[0] : done.start[row] + 1].tolist() for row in range(3)]
    assert rows[1] == decoder.decode([prompts[2]]).rows[0].tokens
    assert rows[0] == rows[2] == decoder.decode([prompts[2]], sampling=SETTINGS[0], streams=[2]).rows[0].tokens


def test_many_logits_are_made_a_part_at_a_time(target, monkeypatch):
    draw = np.random.default_rng(4)
    hidden = jnp.asarray(draw.normal(0, 1, (3, 5, 24)).astype(np.float32))
    index = jnp.asarray(draw.integers(0, 2**31 - 1, (3, 5)).astype(np.int32))
    sampler = Sampler(**{name: jnp.asarray(value) for name, value in SETTINGS[1].rows([4, 5, 6]).items()})
    found = []
    for most in (2**24, 2 * 5 * len(tiny.TOKENS), 1):  # all at once; two rows of three; one row
        monkeypatch.setattr("dflash_jax.decode.sampler.DIRECT_LOGITS", most)
        found.append(jax.jit(lambda h, s, i: choose_tokens(target, h, s, i))(hidden, sampler, index).tolist())
    assert found[0] == found[1] == found[2]
    assert len(np.unique(found[0])) > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "--temperature is 0.0: a positive number is needed .0 is greedy decoding."),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_k": 0}, "--top-k is 0: at least 1 is needed"),
        ({"top_p": 0.0}, "--top-p is 0.0: a share above 0, at most 1, is needed"),
        ({"top_p": 1.01}, "--top-p is 1.01"),
        ({"seed": -1}, r"--sample-seed is -1: it must lie in 0..2147483647"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(InputError, match=message):
        Sampling(**{"temperature": 1.0} | changes)


# The distribution, exactly: a target of five tokens, texts of three. Two tokens would not tell a sampler that is right
# at the first drafted slot from one that is right behind a rejection.
VOCAB, AHEAD, ROWS, BLOCK = 5, 3, 4096, 3
DRAWS = 5 * ROWS


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A target of 5 tokens, and a drafter for it that is right now and then."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | sizes | heads))
    draw = np.random.default_rng(8)
    weights = {
        name: draw.uniform(0.5, 1.5, shape) if len(shape) == 1 else draw.normal(0, 0.5, shape)
        for name, shape in tensor_shapes(read_target_config(folder)).items()
    }
    save_tensors(folder / "model.safetensors", {name: value.astype(np.float32) for name, value in weights.items()})
    config = tiny.tiny_drafter_config(
        hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=VOCAB, capture_layers=(0,),
        num_target_layers=2, block_size=BLOCK, mask_token_id=4,
    )  # fmt: skip
    return load_target(folder), tiny.random_drafter(config)


@pytest.fixture(scope="module")
def exact(small):
    """Logits after the prompt and every text of up to two tokens, from one forward over each whole text."""
    target, _ = small
    texts = [text for n in range(AHEAD) for text in np.ndindex(*(VOCAB,) * n)]
    tokens = np.zeros((len(texts), 2 + AHEAD), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : 1 + len(text)] = [1, *text]
    zeros = jnp.zeros(len(texts), jnp.int32)
    lengths = jnp.asarray(np.array([1 + len(text) for text in texts], np.int32))
    out = jax.jit(prefill)(target, jnp.asarray(tokens), lengths=lengths, position_offset=zeros)
    logits = np.asarray(out.hidden, np.float64) @ np.asarray(target.head, np.float64).T
    return {text: logits[row, len(text)].tolist() for row, text in enumerate(texts)}


def make_decoder(target):
    return Decoder(target, stop_ids=[], max_new_tokens=AHEAD, batch_size=ROWS, prompt_bucket=1)


@pytest.fixture(scope="module")
def sound(small):
    return make_decoder(small[0])


def statistic(decoder, exact, settings, *, drafter=None, claimed=None):
    """Chi-square of DRAWS texts against the exact distribution of `claimed` settings, and its 1e-4 critical value."""
    counts: dict[tuple[int, ...], int] = {}
    for first in range(0, DRAWS, ROWS):
        streams = range(first, first + ROWS)
        batch = decoder.decode([[1]] * ROWS, drafter=drafter, sampling=settings, streams=streams)
        for row in batch.rows:
            counts[tuple(row.tokens)] = counts.get(tuple(row.tokens), 0) + 1
    claimed = claimed or settings
    options = {"temperature": claimed.temperature, "top_k": claimed.top_k, "top_p": claimed.top_p}
    probabilities = sampling.text_probabilities(
        lambda before: sampling.probabilities(exact[before], **options), vocab_size=VOCAB, length=AHEAD
    )
    value, freedom = sampling.chi_square(counts, {text: DRAWS * p for text, p in probabilities.items()})
    assert freedom >= 3
    return value, stats.chi2.ppf(1 - 1e-4, freedom)


WORLD = [
    Sampling(temperature=0.5, seed=1),
    Sampling(temperature=1.0, seed=2),
    Sampling(temperature=1.7, seed=3),
    Sampling(temperature=1.3, top_k=3, top_p=0.85, seed=4),
]
NAMES = ["cold", "warm", "hot", "filtered"]


@pytest.mark.slow
@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "speculative"])
@pytest.mark.parametrize("settings", WORLD, ids=NAMES)
def test_texts_have_exactly_the_target_s_distribution(small, sound, exact, settings, speculative):
    value, critical = statistic(sound, exact, settings, drafter=small[1] if speculative else None)
    assert value < critical


def accept_all(drafted, chosen, *, num_drafted):
    return jnp.minimum(num_drafted, drafted.shape[-1]).astype(jnp.int32) + 0 * chosen[..., 0]


def forget_traces():
    programs: list[Any] = [engine._start, engine._speculative]
    for program in programs:
        program.clear_cache()


def one_key_for_all(sampler, index):
    return token_keys(sampler, jnp.zeros_like(index))


def one_stream_for_all(sampler, index):
    return token_keys(replace(sampler, stream=sampler.stream // ROWS), index)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "broken"),
    [
        ("loop.accept_len", accept_all),
        ("sampler.token_keys", one_key_for_all),
        ("sampler.token_keys", one_stream_for_all),
    ],
    ids=["accepts all", "one key for all indices", "one key for all rows"],
)
def test_broken_samplers_are_found_out(small, exact, monkeypatch, place, broken):
    target, drafter = small
    monkeypatch.setattr(f"dflash_jax.decode.{place}", broken)
    forget_traces()
    value, critical = statistic(make_decoder(target), exact, WORLD[1], drafter=drafter)
    forget_traces()
    assert value > 3 * critical


@pytest.mark.slow
def test_a_temperature_that_is_a_little_off_is_found_out(small, sound, exact):
    settings = Sampling(temperature=1.07, seed=2)
    value, critical = statistic(sound, exact, settings, drafter=small[1], claimed=WORLD[1])
    assert value > 1.5 * critical
