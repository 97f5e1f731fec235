"""Dequantised blocks against transformers' own dequantiser, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dflash_jax.targets import dequantise_mxfp4


def test_by_hand():
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, :3] = 0x2F, 0x71, 0x98
    got = dequantise_mxfp4(jnp.asarray(blocks), jnp.array([128], jnp.uint8), dtype=jnp.float32)
    assert got.shape == (32,)
    assert got[:6].tolist() == [-12.0, 2.0, 1.0, 12.0, -0.0, -1.0]
    assert not got[6:].any()


@pytest.mark.parametrize(("ours", "theirs"), [(jnp.float32, torch.float32), (jnp.bfloat16, torch.bfloat16)])
def test_every_byte_and_every_scale_are_transformers(ours, theirs):
    draw = np.random.default_rng(0)
    # 3 experts of 16 outputs and 6 groups: every byte occurs, and every scale whose values both formats hold
    blocks = np.arange(3 * 16 * 6 * 16, dtype=np.uint32).astype(np.uint8).reshape(3, 16, 6, 16)
    scales = np.resize(draw.permutation(np.arange(2, 252)), 3 * 16 * 6).astype(np.uint8).reshape(3, 16, 6)
    want = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=theirs)
    got = dequantise_mxfp4(jnp.asarray(blocks), jnp.asarray(scales), dtype=ours)
    assert (got.dtype, got.shape) == (jnp.dtype(ours), (3, 16, 192))
    np.testing.assert_array_equal(np.asarray(got.swapaxes(1, 2).astype(jnp.float32)), want.to(torch.float32).numpy())


def test_a_scale_of_255_is_no_number():
    blocks = jnp.full((1, 16), 0x22, jnp.uint8)
    assert np.isnan(dequantise_mxfp4(blocks, jnp.array([255], jnp.uint8), dtype=jnp.float32)).all()
