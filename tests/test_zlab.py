"""The whole chain, judged by others: our run folder in z-lab's package on transformers' SmolLM2, and our offline check.

One set of prompts, three ways to find how many tokens each block commits: our compiled loop, z-lab's `dflash_generate`,
and the check's replay over a cache. They must agree block by block.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.accept import evaluate_cache, replay_blocks
from dflash_jax.cache import open_cache
from dflash_jax.core import no_progress
from dflash_jax.decode import Decoder
from dflash_jax.drafter import draft_blocks, load_drafter
from dflash_jax.interchange import DrafterExportConfig, export_drafter
from dflash_jax.targets import load_target
from dflash_jax.text import load_tokenizer
from support import trained, zlab

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run():
    return trained.trained_drafter()


@pytest.fixture(scope="module")
def target(smollm2):
    return load_target(smollm2)


@pytest.fixture(scope="module")
def drafter(run):
    return load_drafter(run.drafter)


@pytest.fixture(scope="module")
def zlab_drafter(run):
    return zlab.load_zlab_drafter(run.drafter)


@pytest.fixture(scope="module")
def decoded(run, smollm2, target, drafter):
    """Our decoding of the four prompts: two that the drafter was trained on, two that it was not."""
    decoder = Decoder(
        target,
        stop_ids=load_tokenizer(smollm2).stop_ids,
        max_new_tokens=trained.NEW_TOKENS,
        batch_size=len(run.responses),
    )
    return decoder.decode([row["prompt_ids"] for row in run.responses], drafter=drafter).rows


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """What engines are given of the run: bfloat16."""
    out = tmp_path_factory.mktemp("exported") / "drafter"
    export_drafter(DrafterExportConfig(drafter=run.drafter, out=out))
    return out


@pytest.mark.parametrize("given", ["as it was trained", "exported"])
def test_drafter_outputs_on_real_features_are_z_lab_s(run, target, exported, given):
    folder = exported if given == "exported" else run.drafter
    drafter, zlab_drafter = load_drafter(folder), zlab.load_zlab_drafter(folder)
    stored = open_cache(run.unseen_cache).sequence(0)
    features = np.asarray(stored.features, np.float32)
    anchors, lengths = [stored.prompt_len, stored.prompt_len + 9, len(stored.token_ids) - 3], [8, 5, 3]
    ours = draft_blocks(
        drafter,
        target.embed_tokens,
        jnp.asarray(features),
        jnp.asarray(stored.token_ids),
        jnp.asarray(anchors, jnp.int32),
        block_lengths=jnp.asarray(lengths, jnp.int32),
        block_size=8,
        position_offset=jnp.int32(0),
    )
    embed = np.asarray(target.embed_tokens)
    for block, anchor, length in zip(np.asarray(ours), anchors, lengths, strict=True):
        slots = embed[[stored.token_ids[anchor], *[drafter.config.mask_token_id] * (length - 1)]]
        wanted = zlab.zlab_block(zlab_drafter, slots, features[:anchor])
        error = np.abs(block[: length - 1] - wanted[1:]).max() / np.abs(wanted).max()
        assert error < 1e-4, error


def test_accepted_lengths_vary(decoded):
    lengths = [n for row in decoded for n in row.committed]
    assert len(set(lengths)) >= 3, lengths
    assert max(lengths) >= 3
    # the trained prompts go faster: the drafter did learn
    assert np.mean([n for row in decoded[:2] for n in row.committed]) > 1.5


def test_decoding_gives_the_responses_tokens(run, decoded):
    assert [row.tokens for row in decoded] == [row["response_ids"] for row in run.responses]


def test_z_lab_s_loop_gives_the_same_tokens_and_accepted_lengths(run, smollm2, zlab_drafter, decoded):
    hf_target, stop_ids = zlab.load_hf_target(smollm2), load_tokenizer(smollm2).stop_ids
    for response, ours in zip(run.responses, decoded, strict=True):
        theirs = zlab.zlab_generate(
            zlab_drafter, hf_target, response["prompt_ids"], max_new_tokens=trained.NEW_TOKENS, stop_ids=stop_ids
        )
        assert ours.tokens == theirs.tokens
        assert ours.committed == theirs.committed


def test_the_offline_replay_walks_the_same_blocks(run, target, drafter, decoded):
    chains = []
    for cache in (run.cache, run.unseen_cache):
        results = evaluate_cache(
            drafter,
            target.embed_tokens,
            target.head,
            open_cache(cache),
            block_size=8,
            anchors_per_chunk=16,
            max_positions=target.config.max_positions,
            position_offsets=None,
            progress=no_progress,
        )
        chains += [replay_blocks(result) for result in sorted(results, key=lambda result: result.sequence_index)]
    assert chains == [row.committed for row in decoded]
