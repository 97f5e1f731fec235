"""Chosen anchors of stored sequences in one compiled pass per batch: what is drafted there, and accepted.

A batch is sequences of similar length side by side. Their contexts are projected once; then a loop whose number of
turns is not compiled in works off items of `group` sequences x `anchor` anchors each, so that the products of one turn
have the same number of rows whether there are many anchors per sequence or few.
"""

import math
from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, Int64

from dflash_jax.accept.anchors import AnchorChoice, hash_text
from dflash_jax.accept.hits import add_open_rows, no_open_rows, settle_open_rows
from dflash_jax.accept.plan import Item, Job, plan_batches, plan_items
from dflash_jax.cache import Cache, stack_sequences
from dflash_jax.core import Move
from dflash_jax.decode import accept_len
from dflash_jax.drafter import (
    ContextKV,
    Drafter,
    StoredSequence,
    block_labels,
    context_kv,
    draft_head,
    draft_in_context,
    draft_rows_of,
)
from dflash_jax.nn import Screen, Screen16, can_screen

MOST_RIVALS = 512
RIVAL_SHARE = 1 / 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceResult:
    """One sequence at its chosen anchors.

    Attributes:
        prompt_hash: the prompt's identity.
        prompt_set: name of the set the prompt came from.
        text_hash: `hash_text` of prompt and response: equal wherever the same text is stored.
        sequence_index: row of the responses file: equal at every offset of one cache.
        position_offset: absolute position of token 0.
        prompt_len: tokens of the prompt, also the first eligible anchor.
        length: tokens in all.
        num_departures: response tokens that are not the target's greedy token after the text before them.
        anchors: those that were evaluated, rising.
        accepted: accept_len over the labelled slots of each block, 0 to B-1.
        correct: whether the drafted token is the label, by slot; False where there is no label.
        labelled: whether a slot has a label.
        on_chain: whether decoding would start a block at the anchor; None where the chain cannot be walked, since not
            every eligible anchor was evaluated.
    """

    prompt_hash: int
    prompt_set: str
    text_hash: int
    sequence_index: int
    position_offset: int
    prompt_len: int
    length: int
    num_departures: int
    anchors: Int32[np.ndarray, " anchor"]
    accepted: Int32[np.ndarray, " anchor"]
    correct: Bool[np.ndarray, "anchor drafted"]
    labelled: Bool[np.ndarray, "anchor drafted"]
    on_chain: Bool[np.ndarray, " anchor"] | None

    @property
    def committed(self) -> Int[np.ndarray, " anchor"]:
        """Tokens that decoding's block there commits: `accepted + 1`, and no more than the text goes on."""
        return np.minimum(self.accepted + 1, self.length - 1 - self.anchors)

    @property
    def whole(self) -> Bool[np.ndarray, " anchor"]:
        """Anchors whose B-1 slots all have labels: those that `accept_len_mean` is over."""
        return np.asarray(self.labelled.all(axis=1))

    def at(self, chosen: Bool[np.ndarray, " anchor"]) -> "SequenceResult":
        """Return the result at some of its anchors alone; what is on the chain stays so."""
        return replace(
            self,
            anchors=self.anchors[chosen],
            accepted=self.accepted[chosen],
            correct=self.correct[chosen],
            labelled=self.labelled[chosen],
            on_chain=None if self.on_chain is None else self.on_chain[chosen],
        )


def walk_chain(accepted: Int32[np.ndarray, " anchor"], *, prompt_len: int, length: int) -> Bool[np.ndarray, " anchor"]:
    """Return which of the anchors `prompt_len`, `prompt_len + 1`, ... decoding would start a block at.

    From anchor a, `min(accepted + 1, length - 1 - a)` tokens are committed (the bonus falls away where the text ends)
    and the last of them is the next anchor. Worked: prompt_len 3, length 9, accepted by anchor 3..7 = [2, 0, 0, 4, 1]:
    anchor 3 commits 3, anchor 6 commits min(4 + 1, 2) = 2 and the text is at its end: [1, 0, 0, 1, 0].
    """
    on_chain = np.zeros(len(accepted), bool)
    anchor = prompt_len
    while anchor < length - 1:
        on_chain[anchor - prompt_len] = True
        anchor += int(accepted[anchor - prompt_len]) + 1
    return on_chain


class _Texts(eqx.Module):
    """A batch as drafting needs it: the sequences, their features gone, and the contexts that were made of them."""

    sequence: StoredSequence
    context: tuple[ContextKV, ...]


def _draft_item(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    text: _Texts,
    anchors: Int32[Array, " anchor"],
    *,
    block_size: int,
) -> tuple[Float[Array, "anchor drafted hidden"], Int32[Array, "anchor drafted"], Bool[Array, "anchor drafted"]]:
    """Outputs, labels and labelled slots 1 to B-1 of the blocks at some anchors of one sequence."""
    blocks = block_labels(text.sequence, anchors, block_size=block_size)
    hidden = draft_in_context(
        drafter,
        embed_tokens,
        text.context,
        text.sequence.token_ids,
        anchors,
        block_lengths=blocks.lengths,
        block_size=block_size,
        block_offset=text.sequence.position_offset,
    )
    return hidden, blocks.labels, blocks.labelled


def _project(drafter: Drafter, sequences: StoredSequence) -> _Texts:
    """The contexts of a batch, and its texts."""
    index = jnp.arange(sequences.token_ids.shape[-1], dtype=jnp.int32)
    context = jax.vmap(lambda features, offset: context_kv(drafter, features, offset + index))(
        sequences.features, sequences.position_offset
    )
    # the features have done their part: items must not copy them
    return _Texts(sequence=replace(sequences, features=sequences.features[..., :0]), context=context)


@partial(jax.jit, static_argnames=("block_size",))
def _evaluate_items(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    rival_rows: Int32[Array, " rival"],
    sequences: StoredSequence,
    rows: Int32[Array, "item group"],
    anchors: Int32[Array, "item group anchor"],
    num_items: Int32[Array, ""],
    screen: Screen | None,
    *,
    block_size: int,
) -> tuple[
    Int32[Array, "item group anchor"],
    Bool[Array, "item group anchor drafted"],
    Bool[Array, "item group anchor drafted"],
]:
    """accept_len, hits and labelled slots of the first `num_items` items; zeros for the others.

    Items name rows of the batch and anchors in them. Memory beyond the inputs: the contexts' keys and values, one
    item's scores (`group * anchor * block * heads * seq` float32), its rows, logits of a block of rows, and a draft
    vocabulary's rows of the head.
    """
    texts, head = _project(drafter, sequences), draft_head(drafter, head)
    if screen is not None:
        # half the time of the whole head, for rows of its own dtype
        fits = can_screen(head) and drafter.fc.weight.dtype == head.dtype
        if fits and drafter.draft_ids is not None:
            screen = Screen(sixteen=Screen16(rows=draft_head(drafter, screen.sixteen.rows)))
        screen = screen if fits else None
    rivals = head[rival_rows]
    draft = jax.vmap(partial(_draft_item, drafter, embed_tokens, block_size=block_size))
    slots = (*anchors.shape[1:], block_size - 1)
    places = jnp.arange(math.prod(slots), dtype=jnp.int32)

    def evaluate(number: Int32[Array, ""], done):  # noqa: ANN001, ANN202  (three, as at the start)
        waiting, hits, labelled_slots = done
        own = jax.tree_util.tree_map(lambda leaf: leaf[rows[number]], texts)
        hidden, labels, labelled = draft(own, anchors[number])
        # a label outside the draft vocabulary cannot be drafted
        wanted = draft_rows_of(drafter, labels)
        waiting = add_open_rows(
            waiting,
            hidden.reshape(-1, hidden.shape[-1]),
            jnp.maximum(wanted, 0).reshape(-1),
            (labelled & (wanted >= 0)).reshape(-1),
            number * len(places) + places,
            head=head,
            rivals=rivals,
        )
        waiting, hits = settle_open_rows(waiting, hits, head=head, screen=screen, all_=False)
        return waiting, hits, labelled_slots.at[number].set(labelled)

    every = (len(anchors), *slots)
    waiting = no_open_rows(len(places), head=head, dtype=drafter.fc.weight.dtype, screen=screen)
    start = (waiting, jnp.zeros(math.prod(every), bool), jnp.zeros(every, bool))
    waiting, hits, labelled = lax.fori_loop(jnp.int32(0), num_items, evaluate, start)
    _, hits = settle_open_rows(waiting, hits, head=head, screen=screen, all_=True)
    correct = hits.reshape(every)
    # a hit is a token and a miss another: decoding's accept rule sees what it would see
    accepted = accept_len(
        correct.astype(jnp.int32), jnp.ones(every, jnp.int32), num_drafted=labelled.sum(axis=-1, dtype=jnp.int32)
    )
    return accepted, correct, labelled


def label_counts(cache: Cache, indices: Iterable[int], *, vocab_size: int) -> Int64[np.ndarray, " vocab"]:
    """Return how often every token is a label of some sequences' responses: what blocks there are to draft.

    Args:
        cache: sequences.
        indices: which of them.
        vocab_size: tokens.
    """
    counts = np.zeros(vocab_size, np.int64)
    for index in indices:
        stored = cache.sequence(index)
        labels = stored.next_ids[stored.prompt_len :]
        counts += np.bincount(labels[labels >= 0], minlength=vocab_size)  # -1 where an imported cache has none
    return counts


def _rivals(drafter: Drafter, cache: Cache, jobs: SequenceOf[Job], *, vocab_size: int) -> Int32[np.ndarray, " rival"]:
    """Rows of the drafter's head: the most frequent labels, which it says most often, right or wrong."""
    counts = label_counts(cache, [job.index for job in jobs], vocab_size=vocab_size)
    if drafter.draft_ids is not None:
        counts = counts[np.asarray(drafter.draft_ids)]
    number = max(1, min(MOST_RIVALS, int(len(counts) * RIVAL_SHARE)))
    return np.argsort(-counts, kind="stable")[:number].astype(np.int32)


def _jobs(
    cache: Cache, choice: AnchorChoice, position_offsets: tuple[int, ...] | None, rows: Collection[int] | None
) -> list[Job]:
    """Every sequence that is to be evaluated and has an eligible anchor, in the cache's order."""
    jobs = []
    for index in range(cache.num_sequences):
        stored = cache.sequence(index)
        if position_offsets is not None and stored.position_offset not in position_offsets:
            continue
        if rows is not None and stored.sequence_index not in rows:
            continue
        text_hash, length = hash_text(stored.token_ids), len(stored.token_ids)
        # an imported text may end with tokens that have no features: for anchors it ends before them
        end = stored.last_anchor + 2
        anchors = choice.choose(prompt_len=stored.prompt_len, length=end, text_hash=text_hash)
        if len(anchors):
            jobs.append(Job(index=index, length=length, text_hash=text_hash, anchors=anchors))
    return jobs


def _evaluate_batch(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    rival_rows: Int32[Array, " rival"],
    sequences: StoredSequence,
    items: SequenceOf[Item],
    *,
    most_items: int,
    block_size: int,
    screen: Screen | None,
) -> list[dict[int, np.ndarray]]:
    """Accepted, correct and labelled by row of the batch, anchors in order."""
    shape = (most_items, len(items[0].rows), items[0].anchors.shape[1])
    rows, anchors = np.zeros(shape[:2], np.int32), np.zeros(shape, np.int32)
    for number, item in enumerate(items):
        rows[number], anchors[number] = item.rows, item.anchors
    found = _evaluate_items(
        drafter,
        embed_tokens,
        head,
        rival_rows,
        sequences,
        jnp.asarray(rows),
        jnp.asarray(anchors),
        jnp.int32(len(items)),
        screen,
        block_size=block_size,
    )
    parts: list[dict[int, list[np.ndarray]]] = [{}, {}, {}]
    for part, values in zip(parts, map(np.asarray, found), strict=True):
        for number, item in enumerate(items):
            for place, (row, count) in enumerate(zip(item.rows, item.counts, strict=True)):
                part.setdefault(row, []).append(values[number, place, :count])
    return [{row: np.concatenate(pieces) for row, pieces in part.items()} for part in parts]


def _result(cache: Cache, job: Job, accepted: np.ndarray, correct: np.ndarray, labelled: np.ndarray) -> SequenceResult:
    stored = cache.sequence(job.index)
    first, length = stored.prompt_len, stored.last_anchor + 2
    every = len(job.anchors) == length - 1 - first
    greedy = stored.next_ids[first - 1 : -1]
    return SequenceResult(
        prompt_hash=stored.prompt_hash,
        prompt_set=stored.prompt_set,
        text_hash=job.text_hash,
        sequence_index=stored.sequence_index,
        position_offset=stored.position_offset,
        prompt_len=first,
        length=length,
        num_departures=int(((stored.token_ids[first:] != greedy) & (greedy >= 0)).sum()),
        anchors=job.anchors,
        accepted=accepted,
        correct=correct,
        labelled=labelled,
        on_chain=walk_chain(accepted, prompt_len=first, length=length) if every else None,
    )


def evaluate_cache(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    head: Float[Array, "vocab hidden"],
    cache: Cache,
    *,
    max_positions: int,
    block_size: int,
    anchors_per_chunk: int,
    position_offsets: tuple[int, ...] | None,
    progress: Move,
    anchors: AnchorChoice = AnchorChoice(),  # noqa: B008  (frozen)
    tokens_per_batch: int = 4096,
    rows: Collection[int] | None = None,
    screen: Screen | None = None,
) -> list[SequenceResult]:
    """Evaluate the chosen anchors of every sequence, in the cache's order; sequences without one are left out.

    Blocks are shortened at the token budget and at the target's `max_positions`, as decoding does.

    Args:
        drafter: the drafter.
        embed_tokens: the target's embedding.
        head: the target's head.
        cache: sequences and their labels.
        max_positions: the target's context.
        block_size: positions per block.
        anchors_per_chunk: blocks drafted at a time.
        position_offsets: sequences stored at other offsets are left out; None keeps all.
        progress: told sequences done and in all.
        anchors: which anchors.
        tokens_per_batch: tokens whose contexts are kept at a time.
        rows: sequences of other rows of the responses file (`sequence_index`) are left out; None keeps all.
        screen: of the head, made once for many calls where `screen_pays`; it changes no answer.
    """
    jobs = _jobs(cache, anchors, position_offsets, rows)
    rival_rows = jnp.asarray(_rivals(drafter, cache, jobs, vocab_size=head.shape[0]))
    results: dict[int, SequenceResult] = {}
    num_anchors = 0
    for batch in plan_batches(jobs, tokens_per_batch=tokens_per_batch, anchors_per_item=anchors_per_chunk):
        # rows that have no sequence are never asked for
        stored = [cache.sequence(job.index) for job in batch.jobs]
        stored += stored[:1] * (batch.num_rows - len(stored))
        sequences = stack_sequences(stored, width=batch.width, max_new_tokens=cache.manifest["max_new_tokens"])
        found = _evaluate_batch(
            drafter,
            embed_tokens,
            head,
            rival_rows,
            replace(sequences, limit=jnp.minimum(sequences.limit, max_positions)),
            plan_items(batch.jobs, anchors_per_row=batch.anchors_per_row, group=batch.group),
            most_items=batch.most_items,
            block_size=block_size,
            screen=screen,
        )
        for row, job in enumerate(batch.jobs):
            results[job.index] = _result(cache, job, *(part[row] for part in found))
        num_anchors += sum(len(job.anchors) for job in batch.jobs)
        progress(len(results), len(jobs), f"{num_anchors:,} anchors")
    return [results[job.index] for job in jobs]
