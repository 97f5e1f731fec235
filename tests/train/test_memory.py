"""The bytes that are said against those that XLA counts in the compiled step."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from dflash_jax.drafter import StoredSequence, init_drafter
from dflash_jax.train import step_bytes
from dflash_jax.train.memory import num_parameters
from dflash_jax.train.step import make_step, new_state
from support import tiny, tiny_chain

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_layers": 4, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64,
    "block_size": 8, "capture_layers": (1, 10, 18, 27), "num_target_layers": 30, "vocab_size": 49152,
    "max_positions": 8192,
}  # fmt: skip
WIDER = {
    "hidden_size": 96, "intermediate_size": 160, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32,
    "block_size": 8, "capture_layers": (1, 3, 5), "num_target_layers": 8, "vocab_size": 9000, "max_positions": 8192,
}  # fmt: skip


def by_xla(shape, config, *, width):
    """Arguments and temporaries of the compiled step; nothing is allocated."""
    state = eqx.filter_eval_shape(lambda: new_state(init_drafter(shape, key=jax.random.key(0)), config))
    count = config.sequences_per_step

    def batch_of_zeros() -> StoredSequence:
        ids, counts = jnp.zeros((count, width), jnp.int32), jnp.zeros(count, jnp.int32)
        return StoredSequence(
            features=jnp.zeros((count, width, shape.num_features), jnp.bfloat16),
            token_ids=ids,
            next_ids=ids,
            length=counts,
            prompt_len=counts,
            limit=counts,
            position_offset=counts,
        )

    end = jax.ShapeDtypeStruct((shape.vocab_size, shape.hidden_size), jnp.float32)
    batch = jax.eval_shape(batch_of_zeros)
    counted = make_step(config).lower(state, end, end, batch).compile().memory_analysis()
    assert counted is not None
    new = counted.output_size_in_bytes - counted.alias_size_in_bytes
    return counted.argument_size_in_bytes + counted.temp_size_in_bytes + new


@pytest.fixture
def full_compiles():
    """The room's tests let XLA try less; here it is asked what it would really do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.usefixtures("full_compiles")
@pytest.mark.parametrize(
    ("shape", "settings", "width"),
    [
        ({}, {"sequences_per_step": 2, "anchors_per_sequence": 64}, 640),
        (WIDER, {"sequences_per_step": 2, "anchors_per_sequence": 32}, 256),
        (WIDER, {"sequences_per_step": 2, "anchors_per_sequence": 32, "remat": True}, 256),
        (WIDER, {"sequences_per_step": 4, "anchors_per_sequence": 32, "accumulate": 4}, 256),
        (SMOLLM2, {"sequences_per_step": 4, "anchors_per_sequence": 64, "accumulate": 4}, 1024),
        (SMOLLM2, {"sequences_per_step": 1, "anchors_per_sequence": 256}, 1024),
        (SMOLLM2, {"sequences_per_step": 1, "anchors_per_sequence": 256, "sampled_vocab": 4096}, 1024),
        (
            WIDER | {"sliding_window": 64, "sliding_layers": (0, 1, 2)},
            {"sequences_per_step": 2, "anchors_per_sequence": 32},
            256,
        ),
    ],
)
def test_what_is_said_is_within_15_percent_of_what_xla_needs(shape, settings, width):
    drafter = tiny.tiny_drafter_config(**shape)
    config = tiny_chain.train_config(Path(), Path(), Path(), **settings)
    said = step_bytes(drafter, config, width=width)
    assert said.total == pytest.approx(by_xla(drafter, config, width=width), rel=0.15)


@pytest.mark.parametrize("attention_bias", [False, True])
def test_parameters_are_counted_as_they_are(attention_bias):
    shape = tiny.tiny_drafter_config(attention_bias=attention_bias)
    leaves = jax.tree_util.tree_leaves(eqx.filter_eval_shape(lambda: init_drafter(shape, key=jax.random.key(0))))
    assert num_parameters(shape) == (
        sum(leaf.size for leaf in leaves), sum(leaf.size for leaf in leaves if len(leaf.shape) == 2)
    )  # fmt: skip


def test_parts_by_hand():
    shape = tiny.tiny_drafter_config(**SMOLLM2)
    config = tiny_chain.train_config(Path(), Path(), Path(), sequences_per_step=1, anchors_per_sequence=64)
    said = step_bytes(shape, config, width=1024)
    # a layer: q and o 576 x 576, k and v 576 x 192, MLP 3 x 576 x 1536, two norms of 576 and two of 64; fc 2304 x 576
    weights = 4 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576 + 128) + 2304 * 576 + 2 * 576
    assert (said.weights, said.moments, said.gradient) == (4 * weights, 8 * weights, 8 * weights)
    assert said.embedding_and_head == 2 * 49152 * 576 * 4
    assert said.batch == 1024 * (2304 * 2 + 8)
    assert step_bytes(shape, config, width=1024, tied=True).embedding_and_head == 49152 * 576 * 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_16_bit_step_on_a_cpu_has_wide_tables(tied):
    shape, table = tiny.tiny_drafter_config(**SMOLLM2), 49152 * 576

    def tables(cache: Path | None = Path(), **settings):
        config = tiny_chain.train_config(Path(), cache, Path(), dtype="bfloat16", **settings)
        return step_bytes(shape, config, width=256, tied=tied).embedding_and_head

    wide = 4 * table * (1 if tied else 2)
    assert tables() == wide + 2 * table  # the whole head in the step's dtype beside the target's own
    assert tables(sampled_vocab=4096) == wide  # a head that rows are taken of stays as it is
    assert tables(None, features="live", responses=Path()) == 2 * table * (1 if tied else 2)
    # what is planned for is another device
    assert tables(device="h100", plan=True) == 2 * table * (1 if tied else 2)
