"""Windows, sinks, experts, bfloat16: the laws hold for every family, at ragged lengths and offsets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.decode import Decoder, guided_loop, start_decoding
from dflash_jax.decode.loop import speculative_blocks
from dflash_jax.targets import load_target, open_mesh, prefill, put_batch, put_whole, read_target_config
from support import families, tiny, tiny_chain

pytestmark = pytest.mark.slow

NEW, BLOCK, BUCKET = 24, 4, 32
LENGTHS = (1, 3, 17)
OFFSETS = (0, 70000, 2**30)


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    with tiny_chain.quick_compiles():
        yield


@pytest.fixture(scope="module", params=["gpt_oss", "qwen3"])
def target(request, tmp_path_factory):
    changes = {"gpt_oss": families.GPT_OSS, "qwen3": families.QWEN3}[request.param]
    return load_target(families.write_random_target(tmp_path_factory.mktemp("family") / "target", changes))


def recomputed(target, prompts):
    """Greedy text, everything computed again for each token; the window is then no matter of a cache."""
    tokens = np.zeros((len(prompts), BUCKET + NEW), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths, rows = np.array([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    whole = jnp.full(len(prompts), BUCKET + NEW, jnp.int32)
    hidden = jax.jit(lambda t: prefill(target, t, lengths=whole, position_offset=jnp.array(OFFSETS, jnp.int32)).hidden)
    for new in range(NEW):
        last = np.asarray(hidden(jnp.asarray(tokens)))[rows, lengths + new - 1]
        tokens[rows, lengths + new] = (last @ np.asarray(target.head).T).argmax(axis=-1)
    return [tokens[row, n : n + NEW].tolist() for row, n in enumerate(lengths)]


def test_families_decode_losslessly(target):
    draw = np.random.default_rng(3)
    prompts = [draw.integers(0, 101, n).tolist() for n in LENGTHS]
    wanted = recomputed(target, prompts)
    decoder = Decoder(target, stop_ids=[], max_new_tokens=NEW, batch_size=3, prompt_bucket=BUCKET)
    assert [row.tokens for row in decoder.decode(prompts, position_offset=OFFSETS).rows] == wanted
    config = tiny.tiny_drafter_config(
        hidden_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=6, vocab_size=101, capture_layers=(0, 2),
        num_target_layers=4, block_size=BLOCK, attention_bias=True,
    )  # fmt: skip
    drafter = tiny.random_drafter(config)
    rows = decoder.decode(prompts, drafter=drafter, position_offset=OFFSETS).rows
    assert [row.tokens for row in rows] == wanted
    # a random drafter is hardly ever right: guesses that are, more often than not, cut blocks at every length
    guesses = np.zeros((3, 64), np.int32)
    for row, text in enumerate(wanted):
        spoiled = np.where(draw.random(NEW) < 0.3, 0, text)
        guesses[row, LENGTHS[row] : LENGTHS[row] + NEW] = spoiled
    tokens = np.zeros((3, BUCKET), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.array(LENGTHS, jnp.int32)
    state = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))(
        target, drafter, jnp.asarray(tokens), lengths, position_offset=jnp.array(OFFSETS, jnp.int32),
        limit=lengths + NEW, stop_ids=jnp.zeros(0, jnp.int32), capacity=64, max_new_tokens=NEW,
    )  # fmt: skip
    done = jax.jit(guided_loop, static_argnames=("block_size",))(
        target, drafter, state, jnp.asarray(guesses), block_size=BLOCK
    )
    text = np.asarray(done.tokens)
    assert [text[row, n : n + NEW].tolist() for row, n in enumerate(LENGTHS)] == wanted
    assert set(np.unique(done.committed)) == {0, 1, 2, 3, 4}


def test_blocks_are_the_same_on_a_mesh(tmp_path):
    """Heads and vocabulary split, then experts."""
    folder = families.write_random_target(
        tmp_path / "target", families.GPT_OSS | {"vocab_size": 102, "num_local_experts": 8}
    )
    draw = np.random.default_rng(4)
    prompts = [draw.integers(0, 102, n).tolist() for n in LENGTHS]
    drafter = tiny.random_drafter(
        tiny.tiny_drafter_config(
            hidden_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=6, vocab_size=102,
            capture_layers=(0, 2), num_target_layers=4, block_size=BLOCK, attention_bias=True,
        )
    )  # fmt: skip
    found = []
    for mesh in ("data=1", "model=2", "expert=2"):
        config = read_target_config(folder)
        split = load_target(folder, mesh=open_mesh(config, mesh))
        decoder = Decoder(split, stop_ids=[], max_new_tokens=NEW, batch_size=4, prompt_bucket=BUCKET)
        whole = put_whole(split.mesh, drafter)
        rows = decoder.decode(prompts, drafter=whole, position_offset=OFFSETS).rows
        parts = decoder.stream(prompts, drafter=whole, position_offset=OFFSETS, blocks_per_step=5)
        streamed = [
            [n for part in row for n in part.tokens] for row in zip(*(step.rows for step in parts), strict=True)
        ]
        assert streamed == [row.tokens for row in rows]
        found.append(rows)
    assert found[0] == found[1] == found[2]


def test_a_mesh_keeps_every_sequence_on_its_own_devices(tmp_path):
    """All of a batch's arrays are split by sequence, and a program gives them back as it got them."""
    folder = families.write_random_target(tmp_path / "target", families.QWEN3)
    target = load_target(folder, mesh=open_mesh(read_target_config(folder), "data=2"))
    config = tiny.tiny_drafter_config(
        hidden_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=6, vocab_size=101, capture_layers=(0, 2),
        num_target_layers=4, block_size=BLOCK,
    )  # fmt: skip
    drafter = put_whole(target.mesh, tiny.random_drafter(config))
    lengths = np.array([1, 2, 3, 4], np.int32)
    batch = {"prompts": np.ones((4, BUCKET), np.int32), "lengths": lengths, "limit": lengths + NEW}
    batch = put_batch(target.mesh, batch | {"position_offset": np.zeros(4, np.int32)})
    start = jax.jit(start_decoding, static_argnames=("capacity", "max_new_tokens"))
    started = start(target, drafter, **batch, stop_ids=jnp.zeros(0, jnp.int32), capacity=64, max_new_tokens=NEW)
    step = jax.jit(speculative_blocks, static_argnames=("block_size",))
    for state in (started, step(target, drafter, started, num_blocks=jnp.int32(2), block_size=BLOCK)):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        specs = {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in leaves}
        del specs[".stop_ids"]  # of all sequences
        assert len(specs) > 15
        assert {name: spec for name, spec in specs.items() if spec[:1] != ("data",)} == {}


@pytest.mark.parametrize("drafter_dtype", [jnp.bfloat16, jnp.float32], ids=["both", "target"])
def test_bfloat16_weights(drafter, prompts, drafter_dtype):
    half = load_target(tiny.tiny_target(), dtype=jnp.bfloat16)
    drafter = jax.tree_util.tree_map(lambda leaf: leaf.astype(drafter_dtype), drafter)
    decoder = Decoder(half, stop_ids=[tiny.STOP_ID], max_new_tokens=NEW, batch_size=3)
    rows = decoder.decode(prompts[:3], drafter=drafter).rows
    # so small a model rounds the same in blocks as one by one
    assert [row.tokens for row in rows] == [row.tokens for row in decoder.decode(prompts[:3]).rows]
    assert max(n for row in rows for n in row.committed) > 1
