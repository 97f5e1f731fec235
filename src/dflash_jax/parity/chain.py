"""The chain between a text and its accept_len, as links that can be taken from different places and exchanged.

Every combination of links runs through the same compiled functions with other arrays: features, labels and where
positions start are data. Only another kind of angles is another program.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from dflash_jax.cache import stack_sequences
from dflash_jax.decode import accept_len
from dflash_jax.drafter import (
    ContextKV,
    Drafter,
    StoredSequence,
    block_labels,
    context_kv,
    draft_head,
    draft_in_context,
    drafted_tokens,
)
from dflash_jax.parity.texts import Text, TextBatch
from dflash_jax.targets import Target, next_ids, prefill, put_whole

CACHE = "cache"
"""The kind of features and labels that a cache holds; other kinds are settings of the target's angles."""
EXACT = "exact"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where features or labels are taken from.

    Attributes:
        kind: a setting of the target's angles, or `CACHE`.
        offset: absolute position of token 0.
        layer_shift: added to every captured layer's id.
    """

    kind: str
    offset: int
    layer_shift: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """One choice for every link of the chain.

    Attributes:
        features: what the drafter reads.
        labels: what verification compares with.
        context_start: absolute position at which the drafter's context row 0 is placed.
        block_start: the same origin for block slots: slot k of anchor a sits at block_start + a + k.
        drafter_rope: how the drafter's angles are computed.
    """

    features: Source
    labels: Source
    context_start: int
    block_start: int
    drafter_rope: str


def reference_links(offset: int) -> Links:
    """Return the sound chain at an offset."""
    source = Source(kind=EXACT, offset=offset)
    return Links(features=source, labels=source, context_start=offset, block_start=offset, drafter_rope=EXACT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """The target's output for a batch of texts: features of some layers, and labels."""

    features: Float[Array, "batch seq features"]
    next_ids: Int32[np.ndarray, "batch seq"]


@eqx.filter_jit
def _prefill(
    target: Target,
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    position_offset: Int32[Array, " batch"],
    layers: tuple[int, ...],
) -> tuple[Float[Array, "batch seq features"], Int32[Array, "batch seq"]]:
    output = prefill(target, tokens, lengths=lengths, position_offset=position_offset, capture_layers=layers)
    return output.features, next_ids(target, output.hidden)


@jax.jit
def _context(
    drafter: Drafter, features: Float[Array, "seq features"], start: Int32[Array, ""]
) -> tuple[ContextKV, ...]:
    return context_kv(drafter, features, start + jnp.arange(features.shape[0], dtype=jnp.int32))


@eqx.filter_jit
def _hidden(
    drafter: Drafter,
    embed_tokens: Float[Array, "vocab hidden"],
    context: tuple[ContextKV, ...],
    token_ids: Int32[Array, " seq"],
    anchors: Int32[Array, " anchor"],
    block_lengths: Int32[Array, " anchor"],
    start: Int32[Array, ""],
    block_size: int,
) -> Float[Array, "anchor drafted hidden"]:
    return draft_in_context(
        drafter,
        embed_tokens,
        context,
        token_ids,
        anchors,
        block_lengths=block_lengths,
        block_size=block_size,
        block_offset=start,
    )


@jax.jit
def _drafted(
    drafter: Drafter, hidden: Float[Array, "anchor drafted hidden"], head: Float[Array, "draft_vocab hidden"]
) -> Int32[Array, "anchor drafted"]:
    return drafted_tokens(drafter, hidden, head)


@jax.jit
def _judge(
    sequence: StoredSequence, anchors: Int32[Array, " anchor"], drafted: Int32[Array, "anchor drafted"]
) -> tuple[Int32[Array, " anchor"], Bool[Array, "anchor drafted"], Bool[Array, "anchor drafted"]]:
    """accept_len over the labelled slots, hits and labelled slots: the rules of the check and of decoding."""
    target = block_labels(sequence, anchors, block_size=drafted.shape[1] + 1)
    accepted = accept_len(drafted, target.labels, num_drafted=target.labelled.sum(axis=1, dtype=jnp.int32))
    return accepted, (drafted == target.labels) & target.labelled, target.labelled


class Chain:
    """A target, a drafter and where each link may come from."""

    def __init__(self, target: Target, drafter: Drafter, *, block_size: int, anchors_per_chunk: int) -> None:
        """Bind what all texts share; target and drafter have exact angles.

        On the target's mesh every device drafts every block, with the whole drafter, embedding and head: the target's
        passes are what takes time.
        """
        self.target = target
        self.drafter, self.embed_tokens, self.head = put_whole(
            target.mesh, (drafter, target.embed_tokens, draft_head(drafter, target.head))
        )
        self.block_size = block_size
        self.anchors_per_chunk = anchors_per_chunk
        self.layers = drafter.config.capture_layers
        # one program serves the layers themselves and their neighbours
        self._wide = tuple(
            sorted(
                {i + shift for i in self.layers for shift in (-1, 0, 1) if 0 <= i + shift < target.config.num_layers}
            )
        )

    def has_layers(self, shift: int) -> bool:
        """Whether every captured layer has a neighbour so far away; the embedding counts as layer -1."""
        return all(-1 <= layer + shift < self.target.config.num_layers for layer in self.layers)

    def prefill(self, batch: TextBatch, *, kind: str, offset: int, layers: tuple[int, ...]) -> Captured:
        """Run the target over a batch of texts at an offset, with angles of a kind."""
        target = replace(self.target, config=replace(self.target.config, rope_precision=kind))
        features, labels = _prefill(
            target,
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.lengths),
            jnp.full(batch.lengths.shape, offset, jnp.int32),
            layers,
        )
        return Captured(features=put_whole(target.mesh, features), next_ids=np.asarray(labels))

    def columns(self, batch: TextBatch, captured: Captured, *, shift: int) -> Captured:
        """Return the drafter's own layers, moved by `shift`, of what was captured of them and their neighbours."""
        parts = dict(zip(self._wide, jnp.split(captured.features, len(self._wide), axis=-1), strict=True))
        if shift and any(layer + shift == -1 for layer in self.layers):
            parts[-1] = self.embed_tokens[jnp.asarray(batch.tokens)]
        features = jnp.concatenate([parts[layer + shift] for layer in self.layers], axis=-1)
        return Captured(features=features, next_ids=captured.next_ids)

    def capture(self, batch: TextBatch, source: Source) -> Captured:
        """Return features and labels of a batch from one source."""
        if source.kind == CACHE:
            return _read_cached(batch, source.offset)
        wide = self.prefill(batch, kind=source.kind, offset=source.offset, layers=self._wide)
        return self.columns(batch, wide, shift=source.layer_shift)

    def drafter_with(self, rope: str) -> Drafter:
        """Return the drafter with angles of a kind."""
        return replace(self.drafter, config=replace(self.drafter.config, rope_precision=rope))


def _read_cached(batch: TextBatch, offset: int) -> Captured:
    """What a cache holds of a batch at an offset, padded as the batch is."""
    rows, width = batch.tokens.shape
    # rows without a text repeat the first one: nobody looks at them
    stored = [one.cached[offset] for one in batch.texts]
    stacked = stack_sequences(stored + stored[:1] * (rows - len(stored)), width=width, max_new_tokens=None)
    return Captured(features=stacked.features.astype(jnp.float32), next_ids=np.asarray(stacked.next_ids))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What every eligible anchor of a text accepts.

    Attributes:
        accepted: accept_len over the labelled slots, 0 to B-1: where the labels leave the text, a lower bound.
        correct: whether the drafted token is the label, by slot; False where there is no label.
        labelled: whether a slot has a label.
        num_departures: response tokens that are not the label before them.
    """

    accepted: Int32[np.ndarray, " anchor"]
    correct: Bool[np.ndarray, "anchor drafted"]
    labelled: Bool[np.ndarray, "anchor drafted"]
    num_departures: int


def _drafting(links: Links) -> tuple[Source, int, int, str]:
    """What drafted tokens depend on: all links but the labels."""
    return links.features, links.context_start, links.block_start, links.drafter_rope


class Run:
    """A batch of texts going through the chain; what was captured and drafted once is kept while it lives."""

    def __init__(self, chain: Chain, batch: TextBatch) -> None:
        """Nothing is computed yet."""
        self._chain, self.batch = chain, batch
        self._captured: dict[Source, Captured] = {}
        self._tokens: dict[tuple[Source, int, int, str], list[Int32[np.ndarray, "anchor drafted"]]] = {}

    def captured(self, source: Source) -> Captured:
        """Return features and labels from a source."""
        if source not in self._captured:
            self._captured[source] = self._chain.capture(self.batch, source)
        return self._captured[source]

    def forget(self, *, keep: Links) -> None:
        """Let go of everything but what some links need: memory stays that of two offsets."""
        self._captured = {k: v for k, v in self._captured.items() if k in (keep.features, keep.labels)}
        self._tokens = {k: v for k, v in self._tokens.items() if k == _drafting(keep)}

    def hidden(self, row: int, links: Links) -> list[Float[Array, "chunk drafted hidden"]]:
        """Return the drafter's outputs for one text, in chunks of its padded anchors."""
        chain, one = self._chain, self.batch.texts[row]
        features = self.captured(links.features).features[row]
        drafter = chain.drafter_with(links.drafter_rope)
        context = _context(drafter, features, jnp.asarray(np.int32(links.context_start)))
        start = jnp.asarray(np.int32(links.block_start))
        tokens = jnp.asarray(self.batch.tokens[row])
        return [
            _hidden(
                drafter,
                chain.embed_tokens,
                context,
                tokens,
                jnp.asarray(anchors),
                jnp.asarray(np.clip(one.limit - anchors, 1, chain.block_size).astype(np.int32)),
                start,
                chain.block_size,
            )
            for anchors in self._chunks(one)
        ]

    def _chunks(self, one: Text) -> Int32[np.ndarray, "chunks anchor"]:
        """A text's eligible anchors in whole chunks; the last one is repeated to fill."""
        size = self._chain.anchors_per_chunk
        padded = -(-one.num_anchors // size) * size
        anchors = (one.prompt_len + np.minimum(np.arange(padded), one.num_anchors - 1)).astype(np.int32)
        return anchors.reshape(-1, size)

    def _drafted(self, links: Links) -> list[Int32[np.ndarray, "anchor drafted"]]:
        key = _drafting(links)
        if key not in self._tokens:
            drafter, head = self._chain.drafter, self._chain.head
            self._tokens[key] = [
                np.concatenate([np.asarray(_drafted(drafter, hidden, head)) for hidden in self.hidden(row, links)])
                for row in range(len(self.batch.texts))
            ]
        return self._tokens[key]

    def outcomes(self, links: Links) -> list[Outcome]:
        """Return what each text's anchors accept under a choice of links, judged by that choice's labels."""
        labels, results = self.captured(links.labels).next_ids, []
        for row, (one, drafted) in enumerate(zip(self.batch.texts, self._drafted(links), strict=True)):
            stored, chunks = self._stored(row, labels), self._chunks(one)
            parts = [
                _judge(stored, jnp.asarray(anchors), jnp.asarray(tokens))
                for anchors, tokens in zip(chunks, drafted.reshape(*chunks.shape, -1), strict=True)
            ]
            accepted, correct, labelled = (
                np.concatenate([np.asarray(part) for part in column])[: one.num_anchors]
                for column in zip(*parts, strict=True)
            )
            text, first = one.token_ids, one.prompt_len
            departures = int((text[first:] != labels[row, first - 1 : len(text) - 1]).sum())
            results.append(Outcome(accepted=accepted, correct=correct, labelled=labelled, num_departures=departures))
        return results

    def _stored(self, row: int, labels: Int32[np.ndarray, "batch seq"]) -> StoredSequence:
        """A text with some labels, as the label rule wants it; no features."""
        one = self.batch.texts[row]
        length, prompt_len, limit, zero = (
            jnp.asarray(np.int32(value)) for value in (len(one.token_ids), one.prompt_len, one.limit, 0)
        )
        return StoredSequence(
            features=jnp.zeros((labels.shape[1], 0)),
            token_ids=jnp.asarray(self.batch.tokens[row]),
            next_ids=jnp.asarray(labels[row]),
            length=length,
            prompt_len=prompt_len,
            limit=limit,
            position_offset=zero,
        )
