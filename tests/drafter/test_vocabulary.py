"""Draft vocabularies: which tokens, what is drafted of them, and the folder that keeps them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dflash_jax.core import InputError, load_tensors, read_json, save_tensors, write_json
from dflash_jax.drafter import (
    draft_head,
    draft_rows_of,
    drafted_tokens,
    load_drafter,
    most_frequent,
    read_drafter_config,
    save_drafter,
    with_draft_vocabulary,
)
from support import tiny

IDS = np.array([1, 3, 4, 9, 20, 21, 40])


@pytest.fixture(scope="module")
def drafter():
    return with_draft_vocabulary(tiny.random_drafter(tiny.tiny_drafter_config()), IDS)


@pytest.fixture
def folder(drafter, tmp_path):
    save_drafter(drafter, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("counts", "size", "ids"),
    [
        ([0, 5, 2, 5, 9], 2, [1, 4]),  # of 1 and 3 the lower
        ([0, 0, 2, 0, 0], 3, [0, 1, 2]),  # filled up from below
        ([3, 1, 2], 3, [0, 1, 2]),
    ],
)
def test_the_most_frequent_tokens_rise_and_the_lower_wins_a_tie(counts, size, ids):
    assert most_frequent(np.array(counts), size).tolist() == ids


def test_the_argmax_is_over_the_vocabulary_alone(drafter):
    draw = np.random.default_rng(0)
    head = draw.integers(-2, 3, (len(tiny.TOKENS), 24)).astype(np.float32)  # whole numbers: many exact ties
    hidden = draw.integers(-2, 3, (5, 7, 24)).astype(np.float32)
    found = drafted_tokens(drafter, jnp.asarray(hidden), draft_head(drafter, jnp.asarray(head)))
    scores = hidden.astype(np.float64) @ head.T
    wanted = [[max(IDS.tolist(), key=lambda token: (row[token], -token)) for row in block] for block in scores]
    assert found.tolist() == wanted
    assert (scores.argmax(axis=-1) != np.array(wanted)).mean() > 0.5  # the whole vocabulary says otherwise


def test_a_token_outside_has_no_row(drafter):
    every = np.arange(len(tiny.TOKENS), dtype=np.int32)
    rows = np.asarray(draft_rows_of(drafter, jnp.asarray(every)))
    wanted = [IDS.tolist().index(token) if token in IDS else -1 for token in every.tolist()]
    assert rows.tolist() == wanted


def test_without_one_all_is_as_it_was(drafter):
    whole = with_draft_vocabulary(drafter, None)
    plain = tiny.random_drafter(tiny.tiny_drafter_config())
    assert whole.config == plain.config
    assert jax.tree_util.tree_all(jax.tree_util.tree_map(jnp.array_equal, whole, plain))
    head = jnp.ones((9, 24))
    assert draft_head(whole, head) is head
    assert draft_rows_of(whole, jnp.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_keeps_it_beside_the_weights(drafter, folder, dtype):
    read = load_drafter(folder, dtype=jnp.dtype(dtype))
    assert read.draft_ids is not None
    assert (read.draft_ids.tolist(), read.draft_ids.dtype) == (IDS.tolist(), jnp.int32)
    assert read.fc.weight.dtype == jnp.dtype(dtype)
    assert read.config == drafter.config
    stored = load_tensors(folder / "model.safetensors", what="w")
    assert (stored["d2t"].dtype, stored["d2t"].tolist()) == (np.int64, (IDS - np.arange(7)).tolist())
    assert read_json(folder / "config.json", what="c")["draft_vocab_size"] == 7


def test_a_vocabulary_that_is_all_of_it_is_none(drafter, tmp_path):
    save_drafter(with_draft_vocabulary(drafter, None), tmp_path)
    config = read_json(tmp_path / "config.json", what="c")
    assert "draft_vocab_size" not in config
    write_json(tmp_path / "config.json", config | {"draft_vocab_size": config["vocab_size"]})
    assert load_drafter(tmp_path).draft_ids is None


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([0, 1, 1, 1, 1, 1, 0], "must rise"),
        ([-1, 0, 0, 0, 0, 0, 0], "must rise"),
        ([0, 0, 0, 0, 0, 0, 90], "below the vocabulary of 53"),
        (np.zeros(7, ml_dtypes.bfloat16), "bfloat16: one whole number"),
        ([0, 0, 0], r"d2t is \[3\], \[7\] is needed"),
        (None, "missing d2t"),
    ],
)
def test_a_folder_that_names_no_tokens_is_refused(folder, offsets, said):
    tensors = load_tensors(folder / "model.safetensors", what="w")
    del tensors["d2t"]
    save_tensors(folder / "model.safetensors", tensors | ({} if offsets is None else {"d2t": np.asarray(offsets)}))
    with pytest.raises(InputError, match=said):
        load_drafter(folder)


@pytest.mark.parametrize("size", [0, -1, 54])
def test_a_size_out_of_range_is_refused(folder, size):
    config = read_json(folder / "config.json", what="c")
    write_json(folder / "config.json", config | {"draft_vocab_size": size})
    with pytest.raises(InputError, match=f"draft_vocab_size is {size} of 53 tokens"):
        read_drafter_config(folder)
