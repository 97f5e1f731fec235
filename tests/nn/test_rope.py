import dataclasses
import math
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dflash_jax.core import InputError
from dflash_jax.nn import MAX_POSITION, Llama3Scaling, Rope, YarnScaling, apply_rope, rope_cos_sin, scaling_to_json
from dflash_jax.nn.rope import _high_product, rope_angles
from oracles import rope as oracle

POSITIONS = [0, 1, 2, 4095, 131072, 2**24, 2**24 + 1, 2**30, 2**31 - 2, 2**31 - 1]
GPT_OSS = YarnScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False)
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
ROPES = [
    Rope(theta=100000.0, head_dim=64),
    Rope(theta=10000.0, head_dim=6),
    Rope(theta=5e6, head_dim=128),
    Rope(theta=150000.0, head_dim=64, scaling=GPT_OSS),
    Rope(theta=150000.0, head_dim=64, scaling=dataclasses.replace(GPT_OSS, truncate=True)),
    Rope(theta=500000.0, head_dim=128, scaling=LLAMA3),
]
UINT32 = st.integers(0, 2**32 - 1)

jitted_angles = jax.jit(rope_angles, static_argnums=0)
jitted_cos_sin = jax.jit(rope_cos_sin, static_argnums=0)
rotate = jax.jit(apply_rope)


def exact_frequency(rope, pair):
    """Radians per position, from the oracle."""
    plain = oracle.frequency(rope.theta, rope.head_dim, pair)
    if rope.scaling is None:
        return plain
    if isinstance(rope.scaling, Llama3Scaling):
        return oracle.llama3(plain, factor=8, low=1, high=4, original=8192)
    ends = [oracle.yarn_pair(rope.theta, rope.head_dim, turns=turns, original=4096) for turns in (32, 1)]
    if rope.scaling.truncate:
        ends = [Decimal(math.floor(ends[0])), Decimal(math.ceil(ends[1]))]
    return oracle.yarn(plain, pair, factor=32, first=ends[0], last=ends[1])


def angles(rope, positions):
    return np.asarray(jitted_angles(rope, jnp.asarray(np.array(positions, np.int32))))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(UINT32, UINT32), min_size=50, max_size=50))
@example([(2**32 - 1, 2**32 - 1), (0x80000000, 6), (0xFFFF, 0xFFFF), (0x10000, 0x10000), (0, 7)] * 10)
def test_high_product_is_the_high_half_of_pythons_product(pairs):
    a, b = (jnp.asarray(np.array(side, np.uint32)) for side in zip(*pairs, strict=True))
    assert _high_product(a, b).tolist() == [(x * y) >> 32 for x, y in pairs]


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_those_of_the_formula(rope):
    table = rope.frequencies_64()
    assert len(table) == rope.head_dim // 2
    for pair, frequency in enumerate(table):
        exact = exact_frequency(rope, pair) / (2 * oracle.PI) * 2**64
        # half a unit of the table, and float64's roundings: measured 2.8e-16 unscaled, 1.5e-15 where a ramp blends
        assert abs(frequency - exact) <= 0.5 + float(exact) * (4e-16 if rope.scaling is None else 3e-15)


@pytest.mark.parametrize("rope", ROPES)
def test_angles_are_exact_at_any_position(rope):
    got = angles(rope, POSITIONS)
    assert got.dtype == np.float32
    assert np.abs(got).max() <= np.float32(np.pi)
    for row, position in zip(got, POSITIONS, strict=True):
        for pair, value in enumerate(row):
            error = oracle.distance(float(value), oracle.angle(exact_frequency(rope, pair), position))
            # float32's own rounding of an angle below pi: measured 2.6e-7 up to 2^24. At 2^31 the frequency's float64
            # rounding adds to it: measured 4.0e-7. (A float32 product is off by up to 8e-3 at 131072.)
            assert error < (4e-7 if position <= 2**24 + 1 else 8e-7)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, MAX_POSITION), min_size=20, max_size=20))
def test_angles_are_wrapped_integer_phases_bit_for_bit(positions):
    rope = ROPES[0]
    phases = [[position * f % 2**64 >> 32 for f in rope.frequencies_64()] for position in positions]
    signed = np.array(phases, np.uint32).view(np.int32)
    want = signed.astype(np.float32) * np.float32(2 * np.pi / 2**32)
    np.testing.assert_array_equal(angles(rope, positions), want)


@pytest.mark.parametrize("offset", [4096, 131072, 2**20, 2**24, 2**30, 2**31 - 64])
def test_a_shift_of_all_positions_changes_no_difference(offset):
    near, far = (angles(ROPES[0], np.arange(64) + start).astype(np.float64) for start in (0, offset))
    for i, j in [(1, 0), (63, 0), (40, 3)]:
        apart = [oracle.distance(a, b) for a, b in zip(near[i] - near[j], far[i] - far[j], strict=True)]
        assert max(apart) < 7e-7  # two roundings of an angle on either side: measured 4.1e-7


def test_rotation_by_a_quarter_turn():
    x = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]], [[3.0, 4.0]]])
    quarter = (jnp.zeros((3, 1)), jnp.ones((3, 1)))
    assert rotate(x, quarter).tolist() == [[[0.0, 1.0]], [[-1.0, 0.0]], [[-4.0, 3.0]]]


def test_channel_i_is_paired_with_i_plus_half():
    x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    second_pair_only = (jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]))
    assert rotate(x, second_pair_only).tolist() == [[[1.0, -4.0, 3.0, 2.0]]]


def test_it_is_transformers_rotation_at_small_positions():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope = Rope(theta=5000.0, head_dim=10)
    parameters = {"rope_type": "default", "rope_theta": 5000.0}
    config = LlamaConfig(hidden_size=30, num_attention_heads=3, head_dim=10, rope_parameters=parameters)
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 10)).astype(np.float32)
    positions = np.stack([np.arange(7), np.arange(7) + 90]).astype(np.int32)
    cos, sin = LlamaRotaryEmbedding(config)(torch.from_numpy(x), torch.from_numpy(positions).long())
    want = apply_rotary_pos_emb(torch.from_numpy(x), torch.from_numpy(x), cos, sin, unsqueeze_dim=2)[0].numpy()
    got = rotate(jnp.asarray(x), jitted_cos_sin(rope, jnp.asarray(positions)))
    # their float32 angle at position 96 is off by 4e-6
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-5)


def test_the_product_is_float32_and_the_dtype_comes_back():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2, 8)), jnp.bfloat16)
    cos_sin = jitted_cos_sin(Rope(theta=100.0, head_dim=8), jnp.arange(5, dtype=jnp.int32))
    got = rotate(x, cos_sin)
    assert got.dtype == jnp.bfloat16
    assert jnp.array_equal(got, rotate(x.astype(jnp.float32), cos_sin).astype(jnp.bfloat16))


def transformers_rope(rope):
    """The rotary module of transformers, which holds frequencies and attention factor."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": rope.theta} | (scaling_to_json(rope.scaling) or {})
    config = LlamaConfig(
        hidden_size=rope.head_dim, num_attention_heads=1, head_dim=rope.head_dim, rope_parameters=parameters,
        max_position_embeddings=131072,
    )  # fmt: skip
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_and_attention_factor_are_transformers(rope):
    theirs = transformers_rope(rope)
    want = theirs.inv_freq.numpy()
    assert rope.attention_factor == theirs.attention_scaling
    got = rope.frequencies(np.float32)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2.4e-7)  # one unit in the last place
    assert (got != want).sum() <= 2  # measured 0 to 2 of 32 or 64
    np.testing.assert_allclose(rope.frequencies(), want, rtol=1e-6)  # measured 3.3e-7


@pytest.mark.parametrize("rope", [ROPES[1], ROPES[3], ROPES[5]])
def test_float32_is_what_transformers_computes_far_out(rope):
    import torch

    positions = np.array([[0, 1, 4097, 131072, 2**24 + 1]], np.int32)
    theirs = transformers_rope(rope)
    want = theirs(torch.zeros(1, dtype=torch.float32), torch.from_numpy(positions).long())
    same = rope.frequencies(np.float32) == theirs.inv_freq.numpy()
    got = jitted_cos_sin(dataclasses.replace(rope, precision="float32"), jnp.asarray(positions))
    exact = jitted_cos_sin(rope, jnp.asarray(positions))
    for ours, theirs_part, true in zip(got, want, exact, strict=True):
        part = theirs_part.numpy()[..., : rope.head_dim // 2]
        np.testing.assert_allclose(np.asarray(ours)[..., same], part[..., same], atol=4e-7)  # measured 1.2e-7
        # and that is far from the truth: at 2^24 even the integer part of the position is rounded
        assert np.abs(np.asarray(true)[0, -1] - part[0, -1]).max() > 0.1
        np.testing.assert_allclose(np.asarray(true)[0, :2], part[0, :2], atol=1e-6)


def test_bfloat16_is_numpys_bfloat16():
    import ml_dtypes

    positions = np.array([0, 3, 255, 257, 131072, 2**24 + 5], np.int32)
    rope = dataclasses.replace(ROPES[3], precision="bfloat16")
    half = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)
    angle = half(half(positions.astype(np.float32))[:, None] * half(rope.frequencies(np.float32))[None])
    np.testing.assert_array_equal(angles(rope, positions), angle)
    got = jitted_cos_sin(rope, jnp.asarray(positions))
    for ours, function in zip(got, (np.cos, np.sin), strict=True):
        want = half(half(function(angle.astype(np.float64)).astype(np.float32)) * np.float32(rope.attention_factor))
        np.testing.assert_allclose(ours, want, atol=0.008)  # a tie may round the other way: one bfloat16 step near 1.3
        assert (np.asarray(ours) != want).mean() < 0.01
    assert angles(rope, [257]).tolist() == angles(rope, [256]).tolist(), "bfloat16 has no 257"


def test_a_table_ends_and_is_clamped():
    positions = [0, 5, 99, 100, 4096, 2**31 - 1]
    table = dataclasses.replace(ROPES[0], precision="table:100")
    clamped = angles(dataclasses.replace(ROPES[0], precision="float32"), [0, 5, 99, 99, 99, 99])
    np.testing.assert_array_equal(angles(table, positions), clamped)
    np.testing.assert_array_equal(
        angles(dataclasses.replace(table, precision="table:4097"), [4096]),
        angles(dataclasses.replace(table, precision="float32"), [4096]),
    )
    endless = dataclasses.replace(table, precision="table:9999999999")
    np.testing.assert_array_equal(
        angles(endless, [2**31 - 1]), angles(dataclasses.replace(table, precision="float32"), [2**31 - 1])
    )


@pytest.mark.parametrize(
    "text", ["", "Exact", "float64", "table", "table:", "table:0", "table:-3", "table:1.5", "exact "]
)
def test_a_precision_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="choose exact, float32, bfloat16 or table:N") as raised:
        Rope(theta=10.0, head_dim=2, precision=text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("rope", [ROPES[3], ROPES[5]])
def test_the_attention_factor_multiplies_cosines_and_sines(rope):
    cos, sin = jitted_cos_sin(rope, jnp.asarray([0, 77, 2**30], jnp.int32))
    want = 0.1 * math.log(32) + 1 if isinstance(rope.scaling, YarnScaling) else 1.0
    np.testing.assert_allclose(np.sqrt(np.square(cos) + np.square(sin)), want, rtol=1e-6)


def test_a_rope_in_words_and_for_fingerprints():
    assert ROPES[0].describe() == "theta 100000 over 64 channels, unscaled; exact at any position below 2^31"
    assert ROPES[0].to_json() == {"theta": 100000.0, "head_dim": 64}, "caches of the first version say just this"
    table = dataclasses.replace(ROPES[3], precision="table:4096")
    assert table.describe() == (
        "theta 150000 over 64 channels, yarn scaling by 32 from a context of 4096 tokens, cosines and sines times "
        "1.347; angles as table:4096 has them: they change with the absolute position"
    )
    assert table.to_json() == {
        "theta": 150000.0,
        "head_dim": 64,
        "scaling": {
            "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False,
        },
        "precision": "table:4096",
    }  # fmt: skip
