"""Folders that we write, in z-lab's own package: the same numbers out."""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.drafter import draft_blocks, save_drafter
from dflash_jax.nn import Llama3Scaling, YarnScaling
from support import tiny, zlab

pytestmark = pytest.mark.slow

YARN = YarnScaling(factor=8.0, original_max_position_embeddings=32, beta_fast=4.0, truncate=False)
LLAMA3 = Llama3Scaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


# gpt-oss's drafters have biases and YaRN; Qwen3.6's have sliding layers and a full one
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True},
        {"attention_bias": True, "rope_scaling": YARN},
        {"rope_scaling": LLAMA3},
        {"sliding_window": 6, "sliding_layers": (0,)},
        {"sliding_window": 3, "sliding_layers": (0, 1)},
        {"sliding_window": 4, "sliding_layers": (1,), "is_causal": False},
        {"is_causal": True},
    ],
)
def test_drafter_outputs_are_z_lab_s(tmp_path, changes):
    drafter = tiny.random_drafter(tiny.tiny_drafter_config(**changes))
    save_drafter(drafter, tmp_path)
    theirs = zlab.load_zlab_drafter(tmp_path)
    assert (theirs.block_size, theirs.mask_token_id, theirs.target_layer_ids) == (5, tiny.MASK_ID, [1, 3])
    draw = np.random.default_rng(4)
    embed = draw.normal(0, 1, (len(tiny.TOKENS), 24)).astype(np.float32)
    features = draw.normal(0, 1, (41, 48)).astype(np.float32)
    tokens = draw.integers(4, len(tiny.TOKENS), 41).astype(np.int32)
    anchors, lengths = [1, 2, 13, 40], [5, 3, 5, 2]
    ours = draft_blocks(
        drafter,
        jnp.asarray(embed),
        jnp.asarray(features),
        jnp.asarray(tokens),
        jnp.asarray(anchors, jnp.int32),
        block_lengths=jnp.asarray(lengths, jnp.int32),
        block_size=5,
        position_offset=jnp.int32(50),
    )
    for block, anchor, length in zip(np.asarray(ours), anchors, lengths, strict=True):
        slots = embed[[tokens[anchor], *[tiny.MASK_ID] * (length - 1)]]
        wanted = zlab.zlab_block(theirs, slots, features[:anchor], position_offset=50)
        np.testing.assert_allclose(block[: length - 1], wanted[1:], atol=1e-4)  # measured 2e-6
