"""What a training step needs on a device, counted from shapes: no array is made and nothing is compiled."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp

from dflash_jax.drafter import DrafterConfig
from dflash_jax.nn import VOCAB_CHUNK, anchors_per_chunk
from dflash_jax.train.config import TrainConfig

_WIDE = 4  # bytes of float32: weights, gradient, moments, logits, scores


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBytes:
    """Bytes of a step on one device.

    Attributes:
        weights: the drafter's, float32.
        moments: the optimizer's.
        embedding_and_head: the target's, frozen, in the step's dtype; once where they are tied. On a CPU they are
            float32, and a head that a 16-bit step meets whole is there in the step's dtype too (`step.frozen_ends`).
        batch: features, tokens and labels of the sequences; with --accumulate also of one part, taken out of them.
        gradient: float32, and once more while it is clipped.
        added: with --accumulate, the gradient of the parts that are done.
        activations: what the forward pass keeps for the backward pass.
        head_scratch: logits of a chunk of the vocabulary, which turn into exponentials in place, the chunk itself or
            the sampled vocabulary, rows of the head.
        attention_scratch: scores of a chunk of blocks and their slopes (on an NVIDIA GPU in bfloat16, where no score is
            stored, more than is needed); with remat also the layer that is made again.
    """

    weights: int
    moments: int
    embedding_and_head: int
    batch: int
    gradient: int
    added: int
    activations: int
    head_scratch: int
    attention_scratch: int

    @property
    def persistent(self) -> int:
        """What is there before and after a step."""
        return self.weights + self.moments + self.embedding_and_head + self.batch

    @property
    def temporary(self) -> int:
        """The most that is there within a step besides: activations with a scratch, or the gradient when all is done.

        While the gradient of a layer comes, its activations go, so that the two ends of the backward pass are the most.
        """
        return most_at_once(asdict(self))

    @property
    def total(self) -> int:
        """The most that a step holds at once."""
        return self.persistent + self.temporary

    def to_json(self) -> dict[str, int]:
        """Return the parts and their sums by name."""
        return asdict(self) | {"persistent": self.persistent, "temporary": self.temporary, "total": self.total}


def most_at_once(parts: Mapping[str, int]) -> int:
    """Return `StepBytes.temporary` of parts by name."""
    backward = parts["activations"] + max(parts["head_scratch"], parts["attention_scratch"])
    # a part's own gradient is not clipped: what is added up is
    return max(parts["added"] + max(backward, parts["gradient"] // 2), parts["gradient"])


def num_parameters(drafter: DrafterConfig) -> tuple[int, int]:
    """Return how many weights a drafter has, and how many of them are in matrices."""
    hidden, inner, d = drafter.hidden_size, drafter.intermediate_size, drafter.head_dim
    q, kv = drafter.num_heads * d, drafter.num_kv_heads * d
    matrices = drafter.num_layers * hidden * (2 * q + 2 * kv + 3 * inner) + drafter.num_features * hidden
    biases = q + 2 * kv + hidden if drafter.attention_bias else 0
    return matrices + drafter.num_layers * (2 * hidden + 2 * d + biases) + 2 * hidden, matrices


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Rows and widths of a step's activations."""

    slots: int  # of all blocks
    context: int  # tokens of all sequences
    hidden: int
    query: int
    kv: int
    inner: int

    def layer(self) -> int:
        """Numbers that one layer keeps: rows of each width in `drafter.model._run_layer` and `_layer_context`.

        Slots: the residual stream twice, both norms' outputs, o_proj's and down_proj's inputs and outputs (hidden);
        q before and after its norm and RoPE, the attention's output (query); keys and values (kv); gate, up, their
        product (inner). Context: keys before and after their norm and RoPE, values (kv), by token and by head.
        """
        by_slot = 8 * self.hidden + 3 * self.query + 6 * self.kv + 4 * self.inner
        return self.slots * by_slot + self.context * 6 * self.kv

    def kept_by_remat(self) -> int:
        """Numbers that a layer keeps where it is made again: its input, and the context's keys and values."""
        return self.slots * self.hidden + self.context * 2 * self.kv


def _activations(rows: _Rows, drafter: DrafterConfig, *, itemsize: int, remat: bool) -> int:
    ends = rows.context * (drafter.num_features + 3 * rows.hidden) + 2 * rows.slots * rows.hidden
    return itemsize * (ends + drafter.num_layers * (rows.kept_by_remat() if remat else rows.layer()))


def tables_are_wide(config: TrainConfig) -> bool:
    """Whether the target's embedding and head are float32 whatever the step's dtype: on a CPU, from a cache."""
    return config.device is None and config.features == "cached" and jax.default_backend() == "cpu"


def table_bytes(config: TrainConfig, *, numbers: int, tied: bool) -> tuple[int, int]:
    """Return bytes of the target's embedding and head, each of so many numbers, and of the copy that is narrowed."""
    itemsize = jnp.dtype(config.dtype).itemsize
    is_wide = tables_are_wide(config)
    is_narrowed = is_wide and itemsize < _WIDE and not config.sampled_vocab
    return (1 if tied else 2) * numbers * (_WIDE if is_wide else itemsize), is_narrowed * numbers * itemsize


def _scores_at_once() -> int:
    """Arrays of the size of a chunk's scores that the backward pass holds: XLA for CPUs makes most of them in place."""
    return 3 if jax.default_backend() == "cpu" else 5


def step_bytes(
    drafter: DrafterConfig,
    config: TrainConfig,
    *,
    width: int,
    sequences: int | None = None,
    features_itemsize: int = 2,
    tied: bool = False,
) -> StepBytes:
    """Return what a training step holds on a device.

    Held against XLA's own account (`memory_analysis` of the compiled step, on a CPU in float32) it is right to 15 %
    (tests/train/test_memory.py), with remat and without. XLA for CPUs computes bfloat16 in float32 and needs more than
    is said here.

    Args:
        drafter: the drafter's shapes.
        config: anchors, optimizer, dtype, remat, parts.
        width: tokens per sequence, padding included.
        sequences: on this device; None: all of the step's.
        features_itemsize: bytes of a feature as it lies on the device.
        tied: whether the target's head is its embedding.
    """
    sequences = config.sequences_per_step if sequences is None else sequences
    at_once = sequences // config.parts
    itemsize = jnp.dtype(config.dtype).itemsize
    anchors, block = min(config.anchors_per_sequence, width), drafter.block_size
    weights, matrices = num_parameters(drafter)
    vocab, hidden = drafter.vocab_size, drafter.hidden_size
    rows = _Rows(
        slots=at_once * anchors * block,
        context=at_once * width,
        hidden=hidden,
        query=drafter.num_heads * drafter.head_dim,
        kv=drafter.num_kv_heads * drafter.head_dim,
        inner=drafter.intermediate_size,
    )
    columns = min(config.sampled_vocab or vocab, vocab)
    drafted, chunk = at_once * anchors * (block - 1), min(columns, VOCAB_CHUNK)
    rest = columns % VOCAB_CHUNK if columns > chunk else 0
    # a chunk of the head is copied, and all rows that a sample takes are
    copied = columns if columns < vocab else chunk if vocab > chunk else 0
    blocks = anchors_per_chunk(anchors, block=block, heads=drafter.num_heads, context=width)
    scores = at_once * blocks * block * drafter.num_heads * width
    in_parts = config.parts > 1
    moments = 2 * (weights - matrices) + matrices if config.optimizer == "muon" else 2 * weights
    return StepBytes(
        weights=_WIDE * weights,
        moments=_WIDE * moments,
        embedding_and_head=sum(table_bytes(config, numbers=vocab * hidden, tied=tied)),
        batch=(sequences + at_once * in_parts) * width * (drafter.num_features * features_itemsize + 8),
        gradient=2 * _WIDE * weights,
        added=_WIDE * weights * in_parts,
        activations=_activations(rows, drafter, itemsize=itemsize, remat=config.remat),
        head_scratch=_WIDE * drafted * (chunk + rest + 3 * hidden) + copied * hidden * itemsize,
        attention_scratch=_WIDE * _scores_at_once() * scores + (itemsize * rows.layer() if config.remat else 0),
    )
