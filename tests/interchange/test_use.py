"""An imported cache in use: the check and training take the anchors whose context is known, and no other."""

import jax
import numpy as np
import pytest

from dflash_jax.cache import open_cache, stack_sequences
from dflash_jax.check import CheckConfig, check
from dflash_jax.drafter import eligible_anchors, save_drafter
from dflash_jax.interchange import CacheImportConfig, import_cache
from support import tiny
from support.peer_caches import Rollout, write_windows

CONTEXT, BLOCK = 19, 5
ROLLOUTS = (
    Rollout(prompt=[1, *range(5, 5 + CONTEXT)], position_offset=0, steps=(5, 2)),
    Rollout(prompt=[7, *range(12, 12 + CONTEXT)], position_offset=4096, steps=()),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, target_folder):
    folder = tmp_path_factory.mktemp("use")
    sizes = {"context": CONTEXT, "block_size": BLOCK, "capture_layers": tiny.CAPTURE_LAYERS}
    write_windows(folder / "source", target_folder, ROLLOUTS, **sizes)
    import_cache(
        CacheImportConfig(
            format="windows", source=folder / "source", target=target_folder, out=folder / "cache", check_tokens=0
        )
    )
    return folder / "cache"


def test_training_draws_anchors_whose_context_is_known(cache):
    opened = open_cache(cache)
    batch = stack_sequences([opened.sequence(0), opened.sequence(1)], width=64, max_new_tokens=None)
    eligible = np.asarray(jax.vmap(eligible_anchors)(batch))
    assert np.flatnonzero(eligible[0]).tolist() == list(range(19, 19 + 7 + 1))
    assert np.flatnonzero(eligible[1]).tolist() == [19]


def test_the_check_counts_every_sample_of_the_source(cache, target_folder, tmp_path):
    (tmp_path / "drafter").mkdir()
    save_drafter(tiny.random_drafter(tiny.tiny_drafter_config(block_size=BLOCK)), tmp_path / "drafter")
    result = check(CheckConfig(target=target_folder, cache=cache, drafter=tmp_path / "drafter"))
    # anchors 19 to 26 of the first text, 19 of the second; all of them have all labels, those that end a text too
    assert (result["num_anchors"], result["num_prompts"], result["num_unlabelled"]) == (9, 2, 0)
    assert {name: part["num_anchors"] for name, part in result["by_ctx_pos_start"].items()} == {"0": 8, "4096": 1}
