"""The DFlash drafter: its forward, its folder. The target's embedding and head are passed in; it imports no target.

It promises: tensor names, shapes and maths are z-lab's, so folders go both ways; one forward serves training, the check
and decoding; a block sees features strictly before its anchor and its own slots, nothing else. It imports `core` and
`nn`.
"""

from dflash_jax.drafter.blocks import (
    BlockLabels,
    StoredSequence,
    block_distributions,
    block_labels,
    eligible_anchors,
)
from dflash_jax.drafter.config import (
    DrafterConfig,
    check_not_last_layer,
    parse_drafter_config,
    read_drafter_config,
)
from dflash_jax.drafter.folder import (
    DRAFT_TO_TARGET,
    drafter_fingerprint,
    drafter_shapes,
    from_offsets,
    load_drafter,
    save_drafter,
)
from dflash_jax.drafter.model import (
    AS_STORED,
    Compute,
    ContextKV,
    Drafter,
    DrafterLayer,
    Lookup,
    context_kv,
    draft_blocks,
    draft_hidden,
    draft_in_context,
    embed_inputs,
    init_drafter,
    take_rows,
)
from dflash_jax.drafter.vocabulary import (
    draft_head,
    draft_rows_of,
    drafted_tokens,
    most_frequent,
    with_draft_vocabulary,
)

__all__ = [
    "AS_STORED",
    "DRAFT_TO_TARGET",
    "BlockLabels",
    "Compute",
    "ContextKV",
    "Drafter",
    "DrafterConfig",
    "DrafterLayer",
    "Lookup",
    "StoredSequence",
    "block_distributions",
    "block_labels",
    "check_not_last_layer",
    "context_kv",
    "draft_blocks",
    "draft_head",
    "draft_hidden",
    "draft_in_context",
    "draft_rows_of",
    "drafted_tokens",
    "drafter_fingerprint",
    "drafter_shapes",
    "eligible_anchors",
    "embed_inputs",
    "from_offsets",
    "init_drafter",
    "load_drafter",
    "most_frequent",
    "parse_drafter_config",
    "read_drafter_config",
    "save_drafter",
    "take_rows",
    "with_draft_vocabulary",
]
