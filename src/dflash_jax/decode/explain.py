"""Why two ways of decoding parted: the tie between two tokens, held against how far the two ways lie apart elsewhere.

Verification feeds a block of tokens in one forward, plain decoding one token at a time. The sums are the same and their
rounding is not, so logits differ a little, and where two tokens lie closer than that, the one or the other wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from dflash_jax.decode.engine import Decoded, pad_prompts
from dflash_jax.decode.loop import decode_capacity
from dflash_jax.decode.sampler import Sampler, Sampling, token_keys
from dflash_jax.nn import noisy_scores, product
from dflash_jax.targets import Target, extend, prefill

POSITIONS_PER_CHUNK = 16
BLOCKS_BUCKET = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """The first token at which speculative and plain decoding of a prompt differ.

    Scores are logits, with sampling logits over the temperature. Both ways are computed again over plain decoding's
    text.

    Attributes:
        index: of the token among the new ones; 0 is the prompt's own pass.
        plain_token: what plain decoding chose.
        speculative_token: what speculative decoding chose.
        plain_margin: score of the plain token less that of the other one, as plain decoding computes them; None where
            a filter left one of them out.
        speculative_margin: score of the speculative token less that of the plain one, as verification computes them.
        difference_here: largest difference of any token's score between the two ways at this index.
        difference_p50: median over the other indices of that largest difference.
        difference_max: its maximum over the other indices.
        reproduced: whether computing again gave each way's token again.
        explained: whether both margins are within twice `difference_max`: a gap of two scores can move by so much.
    """

    index: int
    plain_token: int
    speculative_token: int
    plain_margin: float | None
    speculative_margin: float | None
    difference_here: float
    difference_p50: float
    difference_max: float
    reproduced: bool
    explained: bool


@partial(jax.jit, static_argnames=("capacity",))
def _hidden_of_blocks(
    target: Target,
    prompts: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    position_offset: Int32[Array, " batch"],
    anchors: Int32[Array, " blocks"],
    blocks: Int32[Array, "blocks block"],
    *,
    capacity: int,
) -> tuple[Float[Array, " hidden"], Float[Array, "blocks block hidden"]]:
    """Hidden states after the prompt, and after every token of every block, fed block after block.

    All rows of the batch hold the same text, of which one is returned: the shapes, and so the rounding, are those of
    decoding. `anchors` counts new tokens.
    """
    out = prefill(target, prompts, lengths=lengths, position_offset=position_offset, capacity=capacity)
    last = jnp.take_along_axis(out.hidden[:1], (lengths[:1] - 1)[:, None, None], axis=1)[0, 0]

    def step(kv, block):  # noqa: ANN001, ANN202  (a scan's body)
        anchor, tokens = block
        kv = type(kv)(layers=kv.layers, lengths=lengths + anchor, position_offset=kv.position_offset)
        out = extend(target, kv, jnp.broadcast_to(tokens, (len(prompts), tokens.shape[0])))
        return out.kv, out.hidden[0]

    _, hidden = lax.scan(step, out.kv, (anchors, blocks))
    return last, hidden


@jax.jit
def _largest_differences(
    ours: Float[Array, "row hidden"], theirs: Float[Array, "row hidden"], head: Float[Array, "vocab hidden"]
) -> Float[Array, " row"]:
    """The largest difference of any token's logit, row by row."""

    def one(pair):  # noqa: ANN001, ANN202
        logits = product("sh,vh->sv", jnp.stack(pair), head, out=jnp.float32)
        return jnp.abs(logits[0] - logits[1]).max()

    return lax.map(one, (ours, theirs), batch_size=POSITIONS_PER_CHUNK)


@jax.jit
def _scores(
    hidden: Float[Array, "row hidden"],
    head: Float[Array, "vocab hidden"],
    sampler: Sampler | None,
    index: Int32[Array, "batch query"],
) -> Float[Array, "row vocab"]:
    """What the choice at one index is made of, for hidden states of either way."""
    logits = product("rh,vh->rv", hidden, head, out=jnp.float32)
    if sampler is None:
        return logits
    rows = logits.shape[0]
    each = lambda value: None if value is None else jnp.broadcast_to(value, (rows,))
    return noisy_scores(
        logits,
        jnp.broadcast_to(token_keys(sampler, index)[0], (rows,)),
        temperature=jnp.broadcast_to(sampler.temperature, (rows,)),
        top_k=each(sampler.top_k),
        top_p=each(sampler.top_p),
    )


def _walk(committed: Sequence[int], flip: int, num_new: int, block_size: int) -> list[int]:
    """Anchors of the blocks: those that were decoded up to the flip's, then whole blocks to the end of the text."""
    anchors, anchor = [], 0
    for count in committed:
        if anchor >= flip:
            break
        anchors.append(anchor)
        anchor += count
    anchor = max(flip, anchors[-1] + 1) if anchors else 0
    return [*anchors, *range(anchor, num_new - 1, block_size)]


def explain_flip(
    target: Target,
    prompt: Sequence[int],
    plain: Decoded,
    speculative: Decoded,
    *,
    block_size: int,
    rows: int,
    prompt_bucket: int,
    max_new_tokens: int,
    position_offset: int = 0,
    sampling: Sampling | None = None,
    stream: int = 0,
) -> Flip | None:
    """Return where two ways of decoding one prompt parted, and whether rounding explains it; None where they did not.

    Args:
        target: the target.
        prompt: token ids.
        plain: the prompt's plain outcome.
        speculative: its speculative outcome.
        block_size: positions per block of the latter.
        rows: rows of the batch that was decoded: other shapes round otherwise.
        prompt_bucket: as given to `Decoder`, as is `max_new_tokens`.
        max_new_tokens: most new tokens.
        position_offset: absolute position of the prompt's first token.
        sampling: how tokens were sampled; None: greedily.
        stream: the prompt's stream of samples.
    """
    pairs = zip(plain.tokens, speculative.tokens, strict=False)
    flip = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if flip is None:
        return None
    text = np.array(plain.tokens, np.int32)
    tokens, lengths = pad_prompts([prompt], rows=rows, bucket=prompt_bucket)
    offsets = np.full(rows, position_offset, np.int32)

    def hidden_of(anchors: list[int], size: int) -> np.ndarray:
        """Hidden state before each new token, as a walk over blocks gives it; NaN where no block does."""
        padded = anchors + [0] * (BLOCKS_BUCKET - len(anchors) % BLOCKS_BUCKET)  # at least one: a text may be one token
        filled = np.concatenate([text, np.zeros(size, np.int32)])
        blocks = np.stack([filled[anchor : anchor + size] for anchor in padded])
        capacity = decode_capacity(tokens.shape[1], max_new_tokens, size)
        first, after = _hidden_of_blocks(
            target, tokens, lengths, offsets, np.array(padded, np.int32), blocks, capacity=capacity
        )
        found = np.full((len(text) + size, first.shape[0]), np.nan, np.float32)
        found[0] = first
        for anchor, states in zip(anchors, np.asarray(after, np.float32)[: len(anchors)], strict=True):
            found[anchor + 1 : anchor + 1 + size] = states  # a later block overwrites what it computes again
        return found[: len(text)]

    one_by_one = hidden_of(list(range(len(text) - 1)), 1)
    in_blocks = hidden_of(_walk(speculative.committed, flip, len(text), block_size), block_size)
    to = lambda array: jnp.asarray(array).astype(target.head.dtype)
    temperature = 1.0 if sampling is None else sampling.temperature
    differences = np.asarray(_largest_differences(to(one_by_one), to(in_blocks), target.head)) / temperature
    sampler = None
    if sampling is not None:
        fields = {name: jnp.asarray(value) for name, value in sampling.rows([stream]).items() if value is not None}
        unset: dict[str, Any] = {"top_k": None, "top_p": None}
        sampler = Sampler(**unset | fields)
    at = jnp.full((1, 1), len(prompt) + flip, jnp.int32)
    scores = np.asarray(_scores(to(np.stack([one_by_one[flip], in_blocks[flip]])), target.head, sampler, at))
    return _judge(plain.tokens[flip], speculative.tokens[flip], scores, differences, flip)


def _judge(
    ours: int, theirs: int, scores: Float[np.ndarray, "2 vocab"], differences: Float[np.ndarray, " new"], flip: int
) -> Flip:
    """The flip at one index, from the scores of both ways there and the differences at every index."""
    others = np.delete(differences, [0, flip] if flip else [0])  # the prompt's own pass is one and the same
    largest = float(others.max()) if len(others) else 0.0
    margins = [float(scores[0, ours] - scores[0, theirs]), float(scores[1, theirs] - scores[1, ours])]
    return Flip(
        index=flip,
        plain_token=ours,
        speculative_token=theirs,
        plain_margin=margins[0] if np.isfinite(margins[0]) else None,
        speculative_margin=margins[1] if np.isfinite(margins[1]) else None,
        difference_here=float(differences[flip]),
        difference_p50=float(np.median(others)) if len(others) else 0.0,
        difference_max=largest,
        reproduced=[int(row.argmax()) for row in scores] == [ours, theirs],
        explained=all(abs(margin) <= 2 * largest for margin in margins),
    )
