"""The forward against transformers on random checkpoints, and the laws it promises."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dflash_jax.nn import head_screen8
from dflash_jax.targets import KVCache, extend, load_target, next_ids, prefill, with_screen
from dflash_jax.targets import decoder as decoder_module
from support.jaxprs import float32_precisions

LAYERS = (0, 1, 2, 3)
LENGTH = 23
OFFSETS = [0, 4096, 65536, 131072, 2**20, 2**24, 2**30, 2**31 - 1 - LENGTH]
NAMES = (
    "grouped",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("tied", "sharded", "llama3", "qwen3")),
    "gpt_oss",
)

jitted_prefill = eqx.filter_jit(prefill)
jitted_extend = eqx.filter_jit(extend)


def tokens_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, 101, shape).astype(np.int32)


def feed(target, tokens, *, lengths=None, position_offset=None, **options):
    tokens = np.asarray(tokens, np.int32)
    rows, width = tokens.shape
    return jitted_prefill(
        target,
        jnp.asarray(tokens),
        lengths=jnp.asarray(np.full(rows, width) if lengths is None else lengths, jnp.int32),
        position_offset=jnp.asarray(np.zeros(rows) if position_offset is None else position_offset, jnp.int32),
        **{"capture_layers": LAYERS, "capacity": 31} | options,
    )


def relative(got, want):
    """Largest difference over the largest value."""
    got, want = (np.asarray(side, np.float64) for side in (got, want))
    return np.abs(got - want).max() / np.abs(want).max()


def rolled_back(kv, lengths):
    return KVCache(layers=kv.layers, lengths=jnp.array(lengths, jnp.int32), position_offset=kv.position_offset)


@pytest.fixture(scope="module", params=["grouped", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def target(request, checkpoints):
    """The plainest family and the one that has everything."""
    return load_target(checkpoints[request.param].folder)


def reference(model, tokens, position_offset=0):
    """What transformers gives, and what each decoder layer put out (its last hidden state is after the norm)."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in model.model.layers]
    ids = torch.from_numpy(np.asarray(tokens, np.int64))
    positions = torch.arange(ids.shape[1])[None] + position_offset
    with torch.no_grad():
        result = model(ids, position_ids=positions, output_hidden_states=True, use_cache=True)
    for hook in hooks:
        hook.remove()
    return result, [out.numpy() for out in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_and_the_logits_are_transformers(checkpoints, name):
    tokens = tokens_of(1, 2, LENGTH)
    theirs, layers = reference(checkpoints[name].model, tokens)
    target = load_target(checkpoints[name].folder)
    ours = feed(target, tokens)
    for layer, features in enumerate(np.split(np.asarray(ours.features), len(LAYERS), axis=-1)):
        assert relative(features, layers[layer]) < 3e-5, layer  # measured 5.5e-6
        if layer + 1 < len(LAYERS):
            np.testing.assert_array_equal(theirs.hidden_states[layer + 1].numpy(), layers[layer])
    assert relative(ours.hidden, theirs.hidden_states[-1]) < 5e-5  # measured 9.2e-6
    logits = jnp.einsum("bsh,vh->bsv", ours.hidden, target.head)
    assert relative(logits, theirs.logits) < 5e-5  # measured 1.1e-5
    assert next_ids(target, ours.hidden).tolist() == theirs.logits.argmax(-1).tolist()


@pytest.mark.slow
def test_gpt_oss_over_several_chunks_of_queries_is_transformers(checkpoints):
    # 300 tokens: two chunks of queries in attention, windows that lie in both, experts with more than one block
    tokens, model = tokens_of(7, 1, 300), checkpoints["gpt_oss"].model
    chosen = []
    hook = model.model.layers[0].mlp.router.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    _, layers = reference(model, tokens)
    hook.remove()
    counts = np.bincount(chosen[0].numpy().ravel(), minlength=7)
    assert counts[1] == 0, "an expert that nobody chooses"
    assert counts.max() > 2 * np.median(counts), "one that more choose than any other"
    ours = feed(load_target(checkpoints["gpt_oss"].folder), tokens, capacity=310)
    for layer, features in enumerate(np.split(np.asarray(ours.features), len(LAYERS), axis=-1)):
        assert relative(features, layers[layer]) < 3e-5, layer


@pytest.mark.parametrize(
    "name", ["grouped", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama3", "qwen3")), "gpt_oss"]
)
def test_keys_are_turned_by_their_absolute_positions(checkpoints, name):
    # Nothing else shows a uniform offset: attention, and so the features, must not change with it.
    tokens, target = tokens_of(2, 2, LENGTH), load_target(checkpoints[name].folder)
    theirs, _ = reference(checkpoints[name].model, tokens, position_offset=1000)
    ours = feed(target, tokens, position_offset=[1000, 1000])
    at_zero = feed(target, tokens)
    for layer in range(len(LAYERS)):
        want = theirs.past_key_values.layers[layer].keys.numpy()
        rows = slice(LENGTH - want.shape[2], LENGTH)  # transformers keeps no more rows of a sliding layer than it sees
        # measured 3.8e-6 and 2.2e-6; transformers' float32 angle at 1000 may be off by 3e-5
        assert relative(ours.kv.layers[layer].k[:, :, rows], want) < 5e-5
        assert relative(at_zero.kv.layers[layer].k[:, :, rows], want) > 0.1
        values = theirs.past_key_values.layers[layer].values.numpy()
        assert relative(ours.kv.layers[layer].v[:, :, rows], values) < 5e-5


def test_features_come_in_the_listed_order(checkpoints):
    tokens, target = tokens_of(1, 2, LENGTH), load_target(checkpoints["grouped"].folder)
    each = np.split(np.asarray(feed(target, tokens).features), len(LAYERS), axis=-1)
    some = feed(target, tokens, capture_layers=(3, 0))
    np.testing.assert_allclose(some.features, np.concatenate([each[3], each[0]], axis=-1), atol=1e-5)


def test_blocks_chunks_and_one_prefill_are_the_same(target):
    tokens, offsets, blocks = tokens_of(3, 2, LENGTH), [0, 70], (9, 5, *[1] * 9)
    whole = feed(target, tokens, position_offset=offsets)
    kv = rolled_back(feed(target, tokens_of(4, 2, LENGTH), position_offset=offsets).kv, [0, 0])
    hidden, features = [], []
    for start, size in zip(np.cumsum([0, *blocks]), blocks, strict=False):
        output = jitted_extend(target, kv, jnp.asarray(tokens[:, start : start + size]), capture_layers=LAYERS)
        kv = output.kv
        hidden.append(output.hidden)
        features.append(output.features)
    assert kv.lengths.tolist() == [LENGTH, LENGTH]
    # measured 1.4e-6
    assert relative(np.concatenate(hidden, axis=1), whole.hidden) < 1e-5
    assert relative(np.concatenate(features, axis=1), whole.features) < 1e-5
    for ours, theirs in zip(jax.tree.leaves(kv.layers), jax.tree.leaves(whole.kv.layers), strict=True):
        assert relative(ours[:, :, :LENGTH], theirs[:, :, :LENGTH]) < 1e-5


def test_a_row_does_not_know_its_neighbours_padding_or_place(target):
    tokens, lengths, offsets = tokens_of(4, 2, LENGTH), np.array([23, 5]), np.array([4096, 7])
    whole = feed(target, tokens, lengths=lengths, position_offset=offsets)
    assert whole.kv.lengths.tolist() == [23, 5]
    moved = feed(target, tokens[::-1], lengths=lengths[::-1], position_offset=offsets[::-1])
    other = np.where(np.arange(LENGTH)[None] < lengths[:, None], tokens, tokens_of(5, 2, LENGTH))
    padded = feed(target, other, lengths=lengths, position_offset=offsets)
    assert not np.array_equal(padded.features, whole.features)
    # experts meet the rows in other places of their blocks, where a product may round otherwise (measured: 0 here too)
    most = 4e-6 if target.config.num_experts else 0
    for row, length in enumerate(lengths):
        assert relative(moved.features[1 - row, :length], whole.features[row, :length]) <= most
        assert relative(padded.features[row, :length], whole.features[row, :length]) <= most
    alone = feed(target, tokens[1:, :5], position_offset=offsets[1:])
    assert relative(alone.features[0], whole.features[1, :5]) < 1e-5  # measured 6.9e-7


def test_padding_is_forgotten_by_what_follows(target):
    tokens = tokens_of(6, 2, LENGTH)
    whole = feed(target, tokens, position_offset=[3, 500])
    kv = feed(target, tokens_of(4, 2, LENGTH), lengths=[0, 0], position_offset=[3, 500]).kv
    assert kv.lengths.tolist() == [0, 0]
    first = jitted_extend(
        target, kv, jnp.asarray(tokens[:, :9]), capture_layers=LAYERS, num_valid=jnp.array([9, 6], jnp.int32)
    ).kv
    assert first.lengths.tolist() == [9, 6]
    following = jnp.asarray(np.stack([tokens[0, 9:14], tokens[1, 6:11]]))
    got = jitted_extend(target, first, following, capture_layers=LAYERS)
    assert got.kv.lengths.tolist() == [14, 11]
    assert got.kv.position_offset.tolist() == [3, 500]
    assert relative(got.features[0], whole.features[0, 9:14]) < 1e-5
    assert relative(got.features[1], whole.features[1, 6:11]) < 1e-5


def test_a_smaller_length_takes_tokens_back(target):
    tokens, wrong = tokens_of(7, 2, LENGTH), tokens_of(8, 2, 9)
    kv = feed(target, tokens, lengths=[9, 4]).kv
    strayed = jitted_extend(target, kv, jnp.asarray(wrong), capture_layers=LAYERS).kv
    assert strayed.lengths.tolist() == [18, 13]
    back = rolled_back(strayed, [9, 4])
    assert not np.array_equal(back.layers[0].k, kv.layers[0].k)
    right = jnp.asarray(np.stack([tokens[0, 9:14], tokens[1, 4:9]]))
    got = jitted_extend(target, back, right, capture_layers=LAYERS)
    want = jitted_extend(target, kv, right, capture_layers=LAYERS)
    np.testing.assert_array_equal(got.features, want.features)
    np.testing.assert_array_equal(got.hidden, want.hidden)


@pytest.mark.parametrize("pays", [True, False])
def test_a_target_gets_a_screen_where_one_pays(monkeypatch, target, pays):
    monkeypatch.setattr(head_screen8, "COLUMNS_PER_PART8", 1)  # its vocabulary is a prime
    monkeypatch.setattr(decoder_module, "screen_pays", lambda dtype, head: pays and dtype == head.dtype)
    with_one = with_screen(target)
    assert (with_one.screen is not None) == pays
    assert with_screen(with_one) is with_one


def test_an_offset_changes_nothing(target):
    tokens = np.repeat(tokens_of(9, 1, LENGTH), len(OFFSETS), axis=0)
    output = feed(target, tokens, position_offset=OFFSETS)
    greedy = np.asarray(next_ids(target, output.hidden))
    for row, offset in enumerate(OFFSETS):
        assert relative(output.features[row], output.features[0]) < 1e-5, offset  # measured 1.7e-6
        assert greedy[row].tolist() == greedy[0].tolist(), offset


@pytest.mark.slow
def test_other_engines_angles_change_with_the_offset(checkpoints):
    tokens, offsets = np.repeat(tokens_of(9, 1, LENGTH), 3, axis=0), [0, 131072, 2**24]
    folder = checkpoints["grouped"].folder
    exact = feed(load_target(folder), tokens, position_offset=offsets).features[0]
    drift = {}
    for rope in ("float32", "bfloat16", "table:64"):
        features = feed(load_target(folder, rope=rope), tokens, position_offset=offsets).features
        drift[rope] = [relative(row, exact) for row in features]
    # measured: 6e-7, 1.1e-4, 0.68; 0.011, 0.84, 0.84; 6e-7, 0.84, 0.84
    assert drift["float32"][0] < 5e-6 < 3e-5 < drift["float32"][1] < 0.1 < drift["float32"][2]
    assert 1e-3 < drift["bfloat16"][0] < 0.1 < drift["bfloat16"][1]
    assert drift["table:64"][0] < 1e-5
    assert min(drift["table:64"][1:]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "gpt_oss"])
def test_bfloat16_is_near_float32_and_stays_bfloat16(checkpoints, name):
    tokens = tokens_of(1, 2, LENGTH)
    half = feed(load_target(checkpoints[name].folder, dtype=jnp.bfloat16), tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves((half.hidden, half.features, half.kv.layers))} == {
        jnp.dtype("bfloat16")
    }
    whole = feed(load_target(checkpoints[name].folder), tokens)
    difference = np.asarray(half.features, np.float32) - np.asarray(whole.features)
    # 8 bits of mantissa through five layers: measured 0.037
    assert np.sqrt((difference**2).mean() / (np.asarray(whole.features) ** 2).mean()) < 0.08


def test_one_cpu_keeps_keys_and_values_of_bfloat16_in_float32(checkpoints, monkeypatch):
    """XLA writes no 16-bit rows in place there; that nothing else is changed by it is seen by what comes out."""
    target, tokens = load_target(checkpoints["grouped"].folder, dtype=jnp.bfloat16), jnp.asarray(tokens_of(1, 2, 9))
    zeros, outputs = jnp.zeros(2, jnp.int32), []
    for one_cpu in (False, True):
        monkeypatch.setattr(decoder_module, "on_one_cpu", lambda one_cpu=one_cpu: one_cpu)
        start = eqx.filter_jit(partial(prefill, capture_layers=LAYERS, capacity=9))  # traced anew
        out = start(target, tokens[:, :6], lengths=zeros + 6, position_offset=zeros)
        assert {leaf.dtype for leaf in jax.tree.leaves(out.kv.layers)} == {jnp.dtype(("bfloat16", "float32")[one_cpu])}
        outputs.append(jitted_extend(target, out.kv, tokens[:, 6:], capture_layers=LAYERS))
    for half, wide in zip(*(jax.tree.leaves((o.features, o.hidden, o.kv.layers)) for o in outputs), strict=True):
        assert relative(wide, half) < 0.05  # measured 0.022: 8 bits of mantissa
    assert {o.features.dtype for o in outputs} == {jnp.dtype("bfloat16")}


def test_more_tokens_than_rows_are_refused(target):
    with pytest.raises(AssertionError, match="23 tokens do not fit a cache of 22 rows"):
        feed(target, tokens_of(1, 1, LENGTH), capacity=22)


def test_room_for_just_the_tokens_and_no_features_unless_asked_for(target):
    zeros = jnp.zeros(2, jnp.int32)
    tokens = jnp.zeros((2, 5), jnp.int32)
    output = eqx.filter_eval_shape(prefill, target, tokens, lengths=zeros, position_offset=zeros)
    assert output.kv.capacity == 5
    assert output.features.shape == (2, 5, 0)


def test_no_product_is_left_to_an_accelerators_default(target):
    """Which rounds float32 operands first; prefill, blocks and the head, of a dense and of a MoE target."""

    def forward(tokens):
        out = prefill(
            target, tokens, lengths=jnp.array([5]), position_offset=jnp.array([0]), capture_layers=(1,), capacity=16
        )
        return next_ids(target, out.hidden), extend(target, out.kv, tokens[:, :2]).hidden

    told = float32_precisions(jax.make_jaxpr(forward)(jnp.ones((1, 5), jnp.int32)).jaxpr)
    assert len(told) > 7 * target.config.num_layers
    assert set(told) == {(jax.lax.Precision.HIGHEST,) * 2}
