"""Features in 8 bits: what is stored against numpy, what comes back, and what it costs."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dflash_jax.cache import cache_info, open_cache, stack_sequences, verify_cache
from dflash_jax.cache.features import FeatureLayout, load_features, load_features_on_host, store_features
from support import toy_cache


def stored_by(features, layout):
    return [np.asarray(array) for array in store_features(jnp.asarray(features), layout)]


def residual_stream(tokens, layout):
    """Numbers as a residual stream has them: sizes that differ by channel, a few channels tens of times larger."""
    draw = np.random.default_rng(4)
    features = draw.normal(0, 1, (tokens, layout.columns)) * np.exp(draw.normal(0, 1, layout.columns))
    features[:, draw.choice(layout.columns, 5)] *= 40
    return features.astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "scales"), [("int8", 24, 3), ("int8", 128, 6), ("float8", 128, 3), ("bfloat16", 24, 0)]
)
def test_scales_per_token(dtype, hidden_size, scales):
    assert FeatureLayout(num_layers=3, hidden_size=hidden_size, dtype=dtype).scales == scales


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_stored_by_hand(dtype):
    layout = FeatureLayout(num_layers=2, hidden_size=2, dtype=dtype)
    features = np.array([[127, -63.6, 0, 0], [448, 1.9375, -4, 448]], np.float32)
    stored, scales = stored_by(features, layout)
    if dtype == "int8":
        # 448 / 127 = 3.5276 is 3.53125 in bfloat16; 448 / 3.53125 = 126.87, -4 / 3.53125 = -1.13
        assert scales.astype(np.float32).tolist() == [[1, 1], [3.53125, 3.53125]]
        assert stored.tolist() == [[127, -64, 0, 0], [127, 1, -1, 127]]
    else:
        # 127 / 448 = 0.28348 is 0.283203125 in bfloat16; 448.4 is cut to 448,
        # -224.6 lies next to -224, 1.9375 between 1.875 and 2
        assert scales.astype(np.float32).tolist() == [[0.283203125, 1], [1, 1]]
        assert stored.astype(np.float32).tolist() == [[448, -224, 0, 0], [448, 2, -4, 448]]


@pytest.mark.parametrize(("dtype", "of_largest", "of_itself"), [("int8", 1 / 254, 0), ("float8", 0, 1 / 16)])
def test_round_trip_against_numpy(dtype, of_largest, of_itself):
    layout = FeatureLayout(num_layers=2, hidden_size=192, dtype=dtype)
    features = residual_stream(50, layout)
    stored, scales = stored_by(features, layout)
    assert (stored.dtype, stored.shape, scales.shape) == (layout.numpy_dtype, features.shape, (50, layout.scales))
    grouped = features.reshape(50, layout.scales, -1)
    largest = np.abs(grouped).max(-1)
    wanted = (largest / np.float32(127 if dtype == "int8" else 448)).astype(ml_dtypes.bfloat16)
    assert np.abs(scales.astype(np.float32) / wanted.astype(np.float32) - 1).max() <= 2**-8  # a tie may go either way
    back = load_features_on_host(stored, scales)
    assert back.dtype == ml_dtypes.bfloat16
    error = np.abs(back.astype(np.float32).reshape(grouped.shape) - grouped)
    # half a step; a clipped value, a rounded scale and the bfloat16 that comes back are within 2^-8 each
    bound = (of_largest + 2**-8) * largest[..., None] + (of_itself + 2**-7) * np.abs(grouped)
    bound += 2**-9 * 2**-6 * largest[..., None] / 448 if dtype == "float8" else 0  # denormal float8
    assert (error <= bound).all()
    # the stored number is the nearest there is
    exact = grouped / scales.astype(np.float32)[..., None]
    limit = 127 if dtype == "int8" else 448
    nearest = np.clip(exact, -limit, limit)
    nearest = (np.round(nearest) if dtype == "int8" else nearest).astype(layout.numpy_dtype)
    assert (stored.reshape(nearest.shape).astype(np.float32) == nearest.astype(np.float32)).mean() > 0.999
    assert np.array_equal(np.asarray(load_features(jnp.asarray(stored), jnp.asarray(scales))), back)


def test_relative_error_on_a_residual_stream():
    """One int8 scale per layer would lose a tenth where channels are 40 times the rest; one per 64 does not."""
    error = {}
    for dtype in ("bfloat16", "int8", "float8"):
        layout = FeatureLayout(num_layers=2, hidden_size=576, dtype=dtype)
        features = residual_stream(40, layout)
        stored, scales = stored_by(features, layout)
        back = load_features_on_host(stored, scales) if layout.quantised else stored
        difference = back.astype(np.float32) - features
        error[dtype] = np.sqrt((difference**2).mean() / (features**2).mean())
    assert error["bfloat16"] < 0.003
    assert 0.003 < error["int8"] < 0.02
    assert 0.003 < error["float8"] < 0.02


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_not_finite_makes_the_scale_so(dtype, bad):
    layout = FeatureLayout(num_layers=2, hidden_size=3, dtype=dtype)
    features = np.ones((2, 6), np.float32)
    features[1, 4] = bad
    scales = stored_by(features, layout)[1].astype(np.float32)
    assert np.isfinite(scales).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(("features", "per_token"), [("int8", 6 + 2 * 2 + 9), ("float8", 6 + 2 * 2 + 9)])
def test_cache_in_8_bits(tmp_path, features, per_token):
    toy_cache.write_inputs(tmp_path, toy_cache.toy_rows(12))
    toy_cache.build_toy(tmp_path, features="float32")
    exact = open_cache(tmp_path / "cache")
    toy_cache.build_toy(tmp_path, features=features, out=tmp_path / "small")
    small = open_cache(tmp_path / "small")
    assert verify_cache(tmp_path / "small")["problems"] == []
    assert cache_info(tmp_path / "small")["bytes_per_token"] == per_token
    picked = [small.sequence(i) for i in range(3)]
    width = max(len(sequence.token_ids) for sequence in picked)
    batch = stack_sequences(picked, width=width, max_new_tokens=None)
    assert batch.features.dtype == ml_dtypes.bfloat16
    for i, sequence in enumerate(picked):
        wanted = exact.sequence(i).features
        assert sequence.stored_features.dtype.itemsize == 1
        assert np.abs(sequence.features.astype(np.float32) - wanted).max() <= 200 * (1 / 16 + 2**-7)
        assert np.array_equal(np.asarray(batch.features[i, : len(wanted)]), sequence.features)
        assert (np.asarray(batch.features[i, len(wanted) :]) == 0).all()
