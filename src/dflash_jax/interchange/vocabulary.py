"""A draft vocabulary on its way out and in: chosen by a cache's labels, and said as speculators says it."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dflash_jax.accept import label_counts
from dflash_jax.cache import check_fingerprint, open_cache
from dflash_jax.core import RECORD_NAME, InputError, load_tensors, read_json, save_tensors
from dflash_jax.drafter import DRAFT_TO_TARGET, Drafter, most_frequent, with_draft_vocabulary
from dflash_jax.interchange.config import DrafterExportConfig
from dflash_jax.targets import load_target

WEIGHTS = "model.safetensors"
WHAT = "the drafter's weights"
HEAD = "lm_head.weight"
TARGET_IN_DRAFT = "t2d"
"""speculators' mask of the draft vocabulary, bool: what `d2t` says, once more."""


def choose_vocabulary(drafter: Drafter, config: DrafterExportConfig) -> tuple[Drafter, dict[str, Any]]:
    """Return the drafter with the tokens that are most frequent in the cache, and what share of the labels they are.

    Raises:
        InputError: no such cache, or one of another target, tokenizer or other captured layers; as many tokens as there
            are, or more; the drafter has a draft vocabulary already, or the cache no labels.
    """
    sizes = drafter.config
    assert config.cache is not None
    assert config.draft_vocab is not None
    if sizes.draft_vocab_size is not None:
        raise InputError(
            f"{config.drafter} has a draft vocabulary of {sizes.draft_vocab_size} tokens already: export the drafter "
            "that it was made of, or leave --draft-vocab out"
        )
    if config.draft_vocab >= sizes.vocab_size:
        raise InputError(f"--draft-vocab is {config.draft_vocab}: fewer than all {sizes.vocab_size} tokens are needed")
    cache = open_cache(config.cache)
    record = config.drafter / RECORD_NAME
    trained = read_json(record, what="the drafter's record") if record.is_file() else {}
    known = trained.get("cache_fingerprint", {}) if isinstance(trained, dict) else {}
    wanted = {name: known[name] for name in ("target_weights", "tokenizer_sha256") if name in known}
    wanted["capture_layers"] = list(sizes.capture_layers)
    check_fingerprint(cache.manifest, wanted, what=f"the drafter {config.drafter}")
    counts = label_counts(cache, range(cache.num_sequences), vocab_size=sizes.vocab_size)
    if not counts.any():
        raise InputError(f"{config.cache} has no labels to count: build it with `cache build`")
    ids = most_frequent(counts, config.draft_vocab)
    return with_draft_vocabulary(drafter, ids), {"label_share": float(counts[ids].sum() / counts.sum())}


def write_head_rows(drafter: Drafter, folder: Path, config: DrafterExportConfig) -> None:
    """Add to speculators' layout what a draft vocabulary needs there: the mask, and the target's rows of the head.

    **Source:** vllm-project/speculators 0.9.0 `models/dflash/core.py`: a whole head is left out there, a reduced one is
    saved, since engines do not cut it from the target's.
    """
    if drafter.draft_ids is None:
        return
    assert config.target is not None
    ids, tensors = np.asarray(drafter.draft_ids), load_tensors(folder / WEIGHTS, what=WHAT)
    mask = np.zeros(drafter.config.vocab_size, bool)
    mask[ids] = True
    head = np.asarray(load_target(config.target, layers=()).head[ids].astype(jnp.dtype(config.dtype)))
    save_tensors(folder / WEIGHTS, {**tensors, TARGET_IN_DRAFT: mask, HEAD: head})


def check_mask(mask: np.ndarray | None, ids: np.ndarray | None, vocab_size: int, *, where: Path) -> None:
    """Refuse a mask that is not what `d2t` says, or that stands alone.

    Raises:
        InputError: they differ.
    """
    if mask is None:
        return
    if ids is None or mask.shape != (vocab_size,) or not np.array_equal(np.flatnonzero(mask), ids):
        raise InputError(
            f"{where}: {TARGET_IN_DRAFT} and {DRAFT_TO_TARGET} do not name the same draft vocabulary of "
            "draft_vocab_size tokens"
        )
