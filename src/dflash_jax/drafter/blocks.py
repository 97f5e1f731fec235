"""The rules of a block in a stored sequence: which anchors are eligible, how long the block is, what its labels are.

    index      0 ... P-1 | P ... S-1        P = prompt_len, S = length
    token      prompt    | response
    anchors                x ... x .        eligible: P <= a <= S-2

The last token is no anchor: its slot 1 would have no label. Where features are known of the first F tokens only (some
imported caches), an anchor's context must be among them: a <= F.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


class StoredSequence(eqx.Module):
    """A sequence of a feature cache on the device, right-padded to a bucket (or a batch of them, under vmap).

    Attributes:
        features: target features of every token.
        token_ids: the text.
        next_ids: the target's greedy token after each token.
        length: tokens that are real.
        prompt_len: tokens of the prompt.
        limit: most tokens decoding would have allowed, prompt included; blocks are shortened there.
        position_offset: absolute position of token 0.
        features_len: tokens whose features are known; None where all are.
        top_ids: the target's likeliest tokens after each token, likeliest first; None where the cache has none.
        top_logprobs: their log-probabilities under the target's whole softmax, nats.
    """

    features: Float[Array, "*batch seq features"]
    token_ids: Int32[Array, "*batch seq"]
    next_ids: Int32[Array, "*batch seq"]
    length: Int32[Array, "*batch"]
    prompt_len: Int32[Array, "*batch"]
    limit: Int32[Array, "*batch"]
    position_offset: Int32[Array, "*batch"]
    features_len: Int32[Array, "*batch"] | None = None
    top_ids: Int32[Array, "*batch seq top"] | None = None
    top_logprobs: Float[Array, "*batch seq top"] | None = None


class BlockLabels(eqx.Module):
    """What verification would compare each drafted slot with.

    Attributes:
        labels: the target's greedy token at slots 1 to B-1; anything where there is no label.
        labelled: whether a slot has a label: it lies in the text, and the text before it follows the greedy path.
        lengths: slots of each block that exist, the anchor's included.
    """

    labels: Int32[Array, "anchor drafted"]
    labelled: Bool[Array, "anchor drafted"]
    lengths: Int32[Array, " anchor"]


def eligible_anchors(sequence: StoredSequence) -> Bool[Array, " seq"]:
    """Return which indices may be anchors: response tokens with a token after them and features of all before them.

    Worked, prompt_len 2, length 6, features_len 3: indices 2 and 3; with features of all six, 2 to 4.
    """
    index = jnp.arange(sequence.token_ids.shape[0], dtype=jnp.int32)
    eligible = (index >= sequence.prompt_len) & (index + 1 < sequence.length)
    return eligible if sequence.features_len is None else eligible & (index <= sequence.features_len)


def block_labels(sequence: StoredSequence, anchors: Int32[Array, " anchor"], *, block_size: int) -> BlockLabels:
    """Return the labels of the blocks at some anchors.

    Slot k's label is `next_ids[a + k - 1]`. It counts when the slot exists, `a + k < length`, and
    `token_ids[a + j] == next_ids[a + j - 1]` for all `1 <= j < k`. Worked, token_ids [5, 6, 7, 9, 1], next_ids
    [6, 7, 8, 1, 2], length 5, limit 9, anchor 0, block_size 5: labels [6, 7, 8, 1], labelled [1, 1, 1, 0]. The text
    leaves the greedy path at index 3 (9, not 8), which slot 3 is still asked for and slot 4 is not.

    **Source:** labels by the target's argmax as speculators@c05b95b trains (`next_ids`); the departure mask is ours.
    """
    slot = jnp.arange(1, block_size, dtype=jnp.int32)
    at = anchors[:, None] + slot[None]
    last = sequence.token_ids.shape[0] - 1
    labels = sequence.next_ids[jnp.clip(at - 1, 0, last)]
    follows = sequence.token_ids[jnp.clip(at, 0, last)] == labels
    before = jnp.pad(jnp.cumprod(follows, axis=1, dtype=jnp.int32)[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    lengths = jnp.clip(sequence.limit - anchors, 1, block_size)
    labelled = (before > 0) & (at < sequence.length) & (slot[None] < lengths[:, None])
    return BlockLabels(labels=labels, labelled=labelled, lengths=lengths)


def block_distributions(
    sequence: StoredSequence, anchors: Int32[Array, " anchor"], *, block_size: int
) -> tuple[Int32[Array, "anchor drafted top"], Float[Array, "anchor drafted top"]]:
    """Return the target's distribution at slots 1 to B-1 of the blocks at some anchors: likeliest tokens and shares.

    That of slot k comes after token `a + k - 1`, as its label does (see `block_labels`, which says where there is one).
    The probabilities are those of the stored tokens, made to sum to 1 (float32): the tail that was not stored is left
    out. Worked, log-probabilities of 0.6 and 0.2: 0.75 and 0.25.
    """
    assert sequence.top_ids is not None
    assert sequence.top_logprobs is not None
    before = anchors[:, None] + jnp.arange(block_size - 1, dtype=jnp.int32)[None]
    before = jnp.minimum(before, sequence.token_ids.shape[0] - 1)
    return sequence.top_ids[before], jax.nn.softmax(sequence.top_logprobs[before].astype(jnp.float32), axis=-1)
