"""Texts through the reference and through the engine at every offset: what each anchor accepts, and what drifts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from dflash_jax.accept import SequenceResult, hash_text, walk_chain
from dflash_jax.core import Move
from dflash_jax.parity.chain import Chain, Links, Outcome, Run
from dflash_jax.parity.engine import Engine
from dflash_jax.parity.texts import Text, TextBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How far an offset's chain is from the reference.

    Attributes:
        features: relative error of a token's features, root mean square over tokens.
        argmax_agreement: share of response tokens whose label is the reference's.
        drafter: relative error of a slot's output on the reference's features, root mean square over slots.
    """

    features: float
    argmax_agreement: float
    drafter: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Everything measured on some texts.

    Attributes:
        texts: in the order of the lists below.
        reference: what the reference accepts.
        engine: what the engine accepts, by offset.
        drift: by offset.
    """

    texts: list[Text]
    reference: list[Outcome]
    engine: Mapping[int, list[Outcome]]
    drift: Mapping[int, Drift]


def relative_errors(
    found: Float[np.ndarray, "*rows channels"], wanted: Float[np.ndarray, "*rows channels"]
) -> Float[np.ndarray, "*rows"]:
    """Return `|found - wanted| / |wanted|` of every row, Euclidean norms. Worked: [3, 5] for [3, 1]: 4 / sqrt(10)."""
    wanted = wanted.astype(np.float32)
    error = np.linalg.norm(found.astype(np.float32) - wanted, axis=-1)
    return error / np.maximum(np.linalg.norm(wanted, axis=-1), np.finfo(np.float32).tiny)


class _RootMeanSquare:
    """Of numbers that come in parts."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, values: Float[np.ndarray, "*shape"]) -> None:
        """Take some more."""
        self._total += float(np.square(values.astype(np.float64)).sum())
        self._count += values.size

    def value(self) -> float:
        """The root mean square of all that were taken."""
        return float(np.sqrt(self._total / max(self._count, 1)))


class _DriftSoFar:
    """The drift at one offset, batch by batch."""

    def __init__(self) -> None:
        self._features, self._drafter = _RootMeanSquare(), _RootMeanSquare()
        self._agreeing, self._labels = 0, 0

    def add(self, run: Run, sound: Links, ours: Links, *, block_size: int) -> None:
        """Take a batch of texts."""
        near, here = run.captured(sound.features), run.captured(ours.features)
        labels, wanted = run.captured(ours.labels).next_ids, run.captured(sound.labels).next_ids
        alone = Links(
            features=sound.features,
            labels=sound.labels,
            context_start=ours.context_start,
            block_start=ours.block_start,
            drafter_rope=ours.drafter_rope,
        )
        for row, one in enumerate(run.batch.texts):
            length, known, first = len(one.token_ids), one.features_len, one.prompt_len - 1
            self._features.add(
                relative_errors(np.asarray(here.features[row, :known]), np.asarray(near.features[row, :known]))
            )
            equal = labels[row, first : length - 1] == wanted[row, first : length - 1]
            self._agreeing, self._labels = self._agreeing + int(equal.sum()), self._labels + equal.size
            self._add_drafter(run, row, sound, alone, block_size=block_size)

    def _add_drafter(self, run: Run, row: int, sound: Links, alone: Links, *, block_size: int) -> None:
        one = run.batch.texts[row]
        wanted, found = (
            np.concatenate([np.asarray(chunk, np.float32) for chunk in run.hidden(row, links)])[: one.num_anchors]
            for links in (sound, alone)
        )
        slots = np.clip(one.limit - one.prompt_len - np.arange(one.num_anchors), 1, block_size)
        self._drafter.add(relative_errors(found, wanted)[np.arange(1, block_size)[None] < slots[:, None]])

    def value(self) -> Drift:
        """The drift of all batches together."""
        return Drift(
            features=self._features.value(),
            argmax_agreement=self._agreeing / self._labels,
            drafter=self._drafter.value(),
        )


def measure(chain: Chain, engine: Engine, batches: Sequence[TextBatch], *, progress: Move) -> Measured:
    """Run every text through the reference and through the engine at every offset; memory is that of one batch."""
    texts: list[Text] = []
    reference: list[Outcome] = []
    outcomes: dict[int, list[Outcome]] = {offset: [] for offset in engine.offsets}
    drift = {offset: _DriftSoFar() for offset in engine.offsets}
    total = len(engine.offsets) * sum(len(batch.texts) for batch in batches)
    for batch in batches:
        run = Run(chain, batch)
        reference += run.outcomes(engine.reference)
        for done, offset in enumerate(engine.offsets, start=1):
            outcomes[offset] += run.outcomes(engine.links(offset))
            drift[offset].add(run, engine.reference, engine.links(offset), block_size=chain.block_size)
            run.forget(keep=engine.reference)
            progress(len(texts) * len(engine.offsets) + done * len(batch.texts), total, f"offset {offset:,}")
        texts += batch.texts
    return Measured(
        texts=texts,
        reference=reference,
        engine=outcomes,
        drift={offset: so_far.value() for offset, so_far in drift.items()},
    )


def whole_blocks(texts: Sequence[Text], reference: Sequence[Outcome]) -> tuple[list[Bool[np.ndarray, " anchor"]], bool]:
    """Return which anchors of each text are compared, and whether these are whole blocks.

    Whole: all B-1 slots have a label in the reference, so that accept_len is not cut short by the text. Where the texts
    leave the target's greedy path so often that fewer than half of the blocks with room are whole, all anchors are
    compared instead, by what their labelled slots accept.
    """
    whole = [np.asarray(outcome.labelled.all(axis=1)) for outcome in reference]
    drafted = reference[0].labelled.shape[1]
    room = sum(max(0, len(one.token_ids) - one.prompt_len - drafted) for one in texts)
    if 2 * sum(int(mask.sum()) for mask in whole) >= max(room, 1):
        return whole, True
    return [np.ones(len(mask), bool) for mask in whole], False


def paired_sums(
    texts: Sequence[Text],
    found: Sequence[Outcome],
    wanted: Sequence[Outcome],
    masks: Sequence[Bool[np.ndarray, " anchor"]],
) -> Float[np.ndarray, "prompts 2"]:
    """Return for every prompt the sum of `found - wanted` over its anchors in the masks, and their number."""
    sums: dict[int, Float[np.ndarray, " 2"]] = {}
    for one, ours, theirs, mask in zip(texts, found, wanted, masks, strict=True):
        pair = np.array([(ours.accepted.astype(int) - theirs.accepted)[mask].sum(), mask.sum()], float)
        sums[one.prompt_hash] = sums.get(one.prompt_hash, np.zeros(2)) + pair
    return np.array(list(sums.values()))


def mean_accepted(outcomes: Sequence[Outcome], masks: Sequence[Bool[np.ndarray, " anchor"]]) -> float:
    """Return accept_len, pooled over the anchors of the masks."""
    pooled = np.concatenate([outcome.accepted[mask] for outcome, mask in zip(outcomes, masks, strict=True)])
    return float(pooled.mean())


def as_results(
    texts: Sequence[Text],
    outcomes: Sequence[Outcome],
    reference: Sequence[Outcome],
    *,
    whole: bool,
    offset: int,
) -> list[SequenceResult]:
    """Return outcomes as `accept.summarise` takes them: over the slots that the reference has labels for."""
    results = []
    for index, (one, ours, sound) in enumerate(zip(texts, outcomes, reference, strict=True)):
        labelled = sound.labelled if whole else np.ones_like(sound.labelled)
        length, count = len(one.token_ids), one.num_anchors
        every = one.prompt_len + count == length - 1
        results.append(
            SequenceResult(
                prompt_hash=one.prompt_hash,
                prompt_set=one.prompt_set,
                text_hash=hash_text(one.token_ids),
                sequence_index=index,
                position_offset=offset,
                prompt_len=one.prompt_len,
                length=length,
                num_departures=sound.num_departures,
                anchors=one.prompt_len + np.arange(count, dtype=np.int32),
                accepted=ours.accepted,
                correct=ours.correct & labelled,
                labelled=labelled,
                on_chain=walk_chain(ours.accepted, prompt_len=one.prompt_len, length=length) if every else None,
            )
        )
    return results
