"""Direct tests that name what is wrong with a link: they look at features, labels and outputs, never at settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from dflash_jax.parity.chain import EXACT, Chain, Links, Run, Source
from dflash_jax.parity.measure import relative_errors

MATCH = 0.05
"""Relative error per token (root mean square) below which features count as the same. Storing them as bfloat16 costs
0.002, as int8 about 0.01; the next layer's are 0.2 away and more."""
_BETTER = 0.25
"""A kind of angles explains features when it leaves at most this part of their distance from exact ones."""
_ANGLES = {"float32": "float32_angles", "bfloat16": "bfloat16_angles"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One test.

    Attributes:
        test: what was compared with what.
        result: what came out.
    """

    test: str
    result: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is wrong with a link.

    Attributes:
        cause_id: a word, see docs/design/005.
        sentence: for people, without a full stop.
        evidence: the tests that were made.
    """

    cause_id: str
    sentence: str
    evidence: list[Evidence]


def _distance(found: Float[np.ndarray, "row channels"], wanted: Float[np.ndarray, "row channels"]) -> float:
    return float(np.sqrt(np.square(relative_errors(found, wanted)).mean()))


def _rows(run: Run, source: Source) -> Float[np.ndarray, "tokens features"]:
    """Features of all texts of a batch, without padding."""
    return _valid(run, np.asarray(run.captured(source).features, np.float32))


def _valid(run: Run, values: Float[np.ndarray, "batch seq channels"]) -> Float[np.ndarray, "tokens channels"]:
    return np.concatenate([values[row, : one.features_len] for row, one in enumerate(run.batch.texts)])


@runtime_checkable
class _Outputs(Protocol):
    """What an engine gives at an offset, or would give with angles of some kind."""

    def __call__(self, offset: int, kind: str | None) -> Float[np.ndarray, "row channels"]:
        """Return it with angles of a kind; None: as the engine gives it."""
        ...


def _wrong_offsets(distances: Mapping[int, float]) -> list[int]:
    """Offsets where an engine is far from exact, or as far as it gets, rising."""
    threshold = min(MATCH, max(distances.values()) / 2)
    return [offset for offset in sorted(distances) if distances[offset] > threshold]


def _tables(run: Run, distances: Mapping[int, float], first_wrong: int) -> list[str]:
    """Tables of angles that would begin to be wrong where an engine does: two guesses at their rows.

    Args:
        run: the texts.
        distances: how far from exact the engine is, by offset.
        first_wrong: first token that is far off, at the first offset that has one.
    """
    wrong = _wrong_offsets(distances)
    clean = [offset for offset in distances if not wrong or offset < wrong[0]]
    between = max(clean) + run.batch.tokens.shape[1] if clean else 1
    inside = [wrong[0] + first_wrong] if wrong else []
    return [f"table:{rows}" for rows in dict.fromkeys([between, *inside])]


def _name_angles(
    outputs: _Outputs, run: Run, offsets: Sequence[int], *, what: str, where: str, first_wrong: int = 1
) -> Finding:
    """Find the kind of angles that gives what the engine gives, at all offsets.

    Args:
        outputs: the engine's, and those of each kind.
        run: the texts.
        offsets: all of the engine's.
        what: what is compared, for people.
        where: whose angles, for people: "the target's".
        first_wrong: see `_tables`.
    """
    found = {offset: outputs(offset, None) for offset in offsets}
    exact = {offset: _distance(found[offset], outputs(offset, EXACT)) for offset in offsets}
    kinds = ("float32", "bfloat16", *_tables(run, exact, first_wrong))
    distances = {kind: max(_distance(found[offset], outputs(offset, kind)) for offset in offsets) for kind in kinds}
    farthest = max(exact.values())
    evidence = [
        Evidence(
            test=f"{what} against those of exact angles and of other kinds: relative error, at the worst offset",
            result=", ".join(f"{kind} {value:.2g}" for kind, value in {EXACT: farthest, **distances}.items()),
        )
    ]
    best = min(distances, key=distances.__getitem__)
    if distances[best] > min(MATCH, _BETTER * farthest):
        sentence = f"{what} are {farthest:.2g} off, and no kind of angles that is known gives them"
        return Finding(cause_id="unknown", sentence=sentence, evidence=evidence)
    if best.startswith("table:"):
        ends = _wrong_offsets(exact)[0]
        sentence = (
            f"{where} table of angles ends before offset {ends:,} or soon after and is clamped there: all tokens "
            "beyond its end sit at one position"
        )
        return Finding(cause_id="table_end", sentence=sentence, evidence=evidence)
    fault = "are rounded to bfloat16" if best == "bfloat16" else "are float32 products, too coarse so far out"
    return Finding(cause_id=_ANGLES[best], sentence=f"{where} rotary angles {fault}", evidence=evidence)


def examine_target_angles(run: Run, here: Source, sound: Source, *, offsets: Sequence[int]) -> Finding:
    """Compare an engine's features with those of each kind of angles at every offset.

    Args:
        run: some texts.
        here: the engine's features at any offset.
        sound: the reference's.
        offsets: all of the engine's.
    """

    def outputs(offset: int, kind: str | None) -> Float[np.ndarray, "row channels"]:
        if kind is None:
            return _rows(run, replace(here, offset=offset))
        # exact angles give the same at every offset
        return _rows(run, sound if kind == EXACT else Source(kind=kind, offset=offset))

    return _name_angles(
        outputs,
        run,
        offsets,
        what="the engine's features",
        where="the target's",
        first_wrong=_first_wrong(run, here, sound, offsets),
    )


def _first_wrong(run: Run, here: Source, sound: Source, offsets: Sequence[int]) -> int:
    """First token of the longest text whose features are not the sound ones, at the first offset that has one; else 1.

    The first token sees itself alone, so no angle can spoil it.
    """
    longest = max(range(len(run.batch.texts)), key=lambda row: run.batch.texts[row].features_len)
    length = run.batch.texts[longest].features_len
    wanted = np.asarray(run.captured(sound).features[longest, :length], np.float32)
    for offset in sorted(offsets):
        found = np.asarray(run.captured(replace(here, offset=offset)).features[longest, :length], np.float32)
        wrong = np.flatnonzero(relative_errors(found, wanted) > MATCH)
        if wrong.size:
            return max(int(wrong[0]), 1)
    return 1


def examine_drafter_angles(run: Run, ours: Mapping[int, Links]) -> Finding:
    """Compare the drafter's outputs in the engine with those of each kind of angles at the same positions.

    Args:
        run: some texts.
        ours: by offset, the sound chain with the engine's drafter.
    """

    def outputs(offset: int, kind: str | None) -> Float[np.ndarray, "row channels"]:
        return _drafter_outputs(run, ours[offset] if kind is None else replace(ours[offset], drafter_rope=kind))

    return _name_angles(outputs, run, sorted(ours), what="the drafter's outputs", where="the drafter's")


def _drafter_outputs(run: Run, links: Links) -> Float[np.ndarray, "slots hidden"]:
    """The drafter's outputs at slots 1 to B-1 of every anchor of a batch."""
    parts = [np.asarray(chunk, np.float32) for row in range(len(run.batch.texts)) for chunk in run.hidden(row, links)]
    hidden = np.concatenate(parts)
    return hidden.reshape(-1, hidden.shape[-1])


def examine_layers(chain: Chain, run: Run, here: Source, *, sound: Source) -> Finding | None:
    """Find the layer of this target whose output each captured block of columns is; None where all are as they should.

    Every layer's output at the same texts is a candidate, and so are the embedding (-1) and the final norm's output.
    """
    layers = tuple(range(chain.target.config.num_layers))
    everything = chain.prefill(run.batch, kind=EXACT, offset=sound.offset, layers=layers)
    candidates = dict(
        zip(layers, np.split(_valid(run, np.asarray(everything.features)), len(layers), axis=1), strict=True)
    )
    candidates[-1] = _valid(run, np.asarray(chain.target.embed_tokens)[run.batch.tokens])
    normed = _valid(run, np.asarray(chain.target.norm(everything.features[..., -chain.target.config.hidden_size :])))
    candidates[len(layers)] = normed
    blocks = np.split(_rows(run, here), len(chain.layers), axis=1)
    nearest, distances, own = [], [], []
    for block, layer in zip(blocks, chain.layers, strict=True):
        by_layer = {candidate: _distance(block, values) for candidate, values in candidates.items()}
        best = min(by_layer, key=by_layer.__getitem__)
        nearest.append(best)
        distances.append(by_layer[best])
        own.append(by_layer[layer])
    return _name_layers(chain.layers, nearest, distances, own, last=len(layers))


def _name_layers(
    wanted: Sequence[int], nearest: Sequence[int], distances: Sequence[float], own: Sequence[float], *, last: int
) -> Finding | None:
    """A finding from the nearest layers and the distances to them and to the wanted ones."""
    if max(own) <= MATCH:
        return None
    told = ", ".join(
        f"columns of layer {layer}: {own_distance:.2g} from it, nearest layer {near} at {distance:.2g}"
        for layer, near, distance, own_distance in zip(wanted, nearest, distances, own, strict=True)
    )
    evidence = [
        Evidence(
            test="each captured block of columns against every layer's output here, relative error "
            f"(-1: the embedding, {last}: after the final norm)",
            result=told,
        )
    ]
    if max(distances) <= MATCH:
        shifts = {near - layer for near, layer in zip(nearest, wanted, strict=True)}
        how = f"moved by {shifts.pop():+d}" if len(shifts) == 1 else "others"
        sentence = (
            f"the captured layers are {how}: the features are those of layers {', '.join(map(str, nearest))}, and the "
            f"drafter reads them as layers {', '.join(map(str, wanted))}"
        )
        return Finding(cause_id="capture_layers_shifted", sentence=sentence, evidence=evidence)
    sentence = (
        f"the features are not this target's: no layer's output is nearer than {max(distances):.2g} to them, so they "
        "come from another target or from other weights of it"
    )
    return Finding(cause_id="other_target", sentence=sentence, evidence=evidence)


def examine_rows(run: Run, here: Source, sound: Source) -> Finding | None:
    """Compare features with those of the token before and after; None where neither is nearer than the token's own."""
    distances = {}
    for shift in (-1, 0, 1):
        found, wanted = [], []
        for row, one in enumerate(run.batch.texts):
            index = np.arange(1, one.features_len - 1)
            found.append(np.asarray(run.captured(here).features[row], np.float32)[index])
            wanted.append(np.asarray(run.captured(sound).features[row], np.float32)[index + shift])
        distances[shift] = _distance(np.concatenate(found), np.concatenate(wanted))
    best = min(distances, key=distances.__getitem__)
    if best == 0 or distances[best] > min(MATCH, _BETTER * distances[0]):
        return None
    told = ", ".join(f"moved by {shift:+d}: {distance:.2g}" for shift, distance in distances.items())
    return Finding(
        cause_id="offset_off_by_one",
        sentence=f"the features are moved by {best:+d} token: each row holds its neighbour's",
        evidence=[Evidence(test="the engine's features against those of the neighbouring tokens here", result=told)],
    )


def examine_labels(run: Run, here: Source, sound: Source) -> Finding:
    """Compare labels with the reference's, in place and moved by a token either way."""
    found, wanted = run.captured(here).next_ids, run.captured(sound).next_ids
    shares = {}
    for shift in (-1, 0, 1):
        equal = total = 0
        for row, one in enumerate(run.batch.texts):
            index = np.arange(1, len(one.token_ids) - 1)
            equal += int((found[row, index] == wanted[row, index + shift]).sum())
            total += len(index)
        shares[shift] = equal / max(total, 1)
    told = ", ".join(f"moved by {shift:+d}: {share:.1%} equal" for shift, share in shares.items())
    evidence = [Evidence(test="the engine's labels against those computed here", result=told)]
    best = max(shares, key=shares.__getitem__)
    if best and shares[best] > 1 - MATCH:
        sentence = f"the labels are moved by {best:+d} token: each row holds its neighbour's"
        return Finding(cause_id="offset_off_by_one", sentence=sentence, evidence=evidence)
    return Finding(
        cause_id="unknown",
        sentence=f"the labels are not this target's greedy tokens ({shares[0]:.1%} are)",
        evidence=evidence,
    )


def examine_positions(context_start: int, block_start: int, *, offset: int) -> Finding:
    """Name what is wrong where the block is not where the context's rows say."""
    relative = block_start - context_start
    evidence = [
        Evidence(
            test=f"where the engine places the drafter's positions at offset {offset:,}",
            result=f"context row 0 at {context_start:,}, block slots counted from {block_start:,}: {relative:+,} apart",
        )
    ]
    ignoring = abs(abs(relative) - offset) <= min(16, offset // 2)
    if ignoring and offset > 1:
        who, other = ("context rows", "block slots") if relative > 0 else ("block slots", "context rows")
        sentence = (
            f"the drafter's {who} ignore the offset while its {other} do not: at offset {offset:,} the block sits "
            f"{abs(relative):,} positions from its context"
        )
        return Finding(cause_id="drafter_ignores_offset", sentence=sentence, evidence=evidence)
    sentence = (
        f"the drafter's block slots sit {abs(relative)} position{'s' if abs(relative) > 1 else ''} too "
        f"{'far' if relative > 0 else 'near'}, seen from its context rows"
    )
    return Finding(cause_id="offset_off_by_one", sentence=sentence, evidence=evidence)
