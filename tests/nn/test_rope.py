import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dflash_jax.nn import MAX_POSITION, Rope, apply_rope, rope_cos_sin
from dflash_jax.nn.rope import _high_product, rope_angles
from oracles import rope as oracle

POSITIONS = [0, 1, 2, 4095, 131072, 2**24, 2**24 + 1, 2**30, 2**31 - 2, 2**31 - 1]
ROPES = [Rope(theta=100000.0, head_dim=64), Rope(theta=10000.0, head_dim=6), Rope(theta=5e6, head_dim=128)]
UINT32 = st.integers(0, 2**32 - 1)

jitted_angles = jax.jit(rope_angles, static_argnums=0)
jitted_cos_sin = jax.jit(rope_cos_sin, static_argnums=0)
rotate = jax.jit(apply_rope)


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
        exact = oracle.turns(rope.theta, rope.head_dim, pair, 1) * 2**64
        # half a unit of the table, and float64's rounding of a power and a quotient: measured 1.9e-16
        assert abs(frequency - exact) <= 0.5 + float(exact) * 4e-16


@pytest.mark.parametrize("rope", ROPES)
def test_angles_are_exact_at_any_position(rope):
    got = angles(rope, POSITIONS)
    assert got.dtype == np.float32
    assert np.abs(got).max() <= np.float32(np.pi)
    for row, position in zip(got, POSITIONS, strict=True):
        for pair, value in enumerate(row):
            error = oracle.distance(float(value), oracle.angle(rope.theta, rope.head_dim, pair, position))
            # float32's own rounding of an angle below pi: measured 2.6e-7 up to 2^24. At 2^31 the frequency's float64
            # rounding adds to it: measured 4.0e-7. (A float32 product is off by up to 8e-3 at 131072.)
            assert error < (4e-7 if position <= 2**24 + 1 else 6e-7)


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
