"""Per-anchor results made by hand."""

import numpy as np

from dflash_jax.accept import SequenceResult, walk_chain


def some_result(
    accepted,
    *,
    prompt_len,
    block_size=4,
    correct=None,
    prompt_hash=1,
    sequence_index=0,
    position_offset=0,
    prompt_set="toy",
    text_hash=None,
    num_departures=0,
):
    """A greedy text of `len(accepted) + 1` response tokens: slots are labelled as far as the text goes."""
    length = prompt_len + len(accepted) + 1
    labelled = np.array([
        [prompt_len + i + k < length for k in range(1, block_size)] for i in range(len(accepted))
    ])  # fmt: skip
    hits = labelled & (np.zeros_like(labelled) if correct is None else np.array(correct, bool))
    accepted = np.array(accepted, np.int32)
    return SequenceResult(
        prompt_hash=prompt_hash,
        prompt_set=prompt_set,
        text_hash=prompt_hash if text_hash is None else text_hash,
        sequence_index=sequence_index,
        position_offset=position_offset,
        prompt_len=prompt_len,
        length=length,
        num_departures=num_departures,
        anchors=np.arange(prompt_len, length - 1, dtype=np.int32),
        accepted=accepted,
        correct=hits,
        labelled=labelled,
        on_chain=walk_chain(accepted, prompt_len=prompt_len, length=length),
    )
