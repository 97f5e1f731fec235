"""Direct tests that name what is wrong with a link: they look at features, labels and outputs, never at settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from dflash_jax.parity.chain import EXACT, Chain, Links, Run, Source
from dflash_jax.parity.measure import relative_errors

MATCH = 0.05
"""Median relative error per token below which features count as the same: storing them as bfloat16 costs 0.002, as int8
about 0.01; the next layer's are some 0.2 away and more."""
_BETTER = 0.25
"""An explanation must leave at most this part of the error."""
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
    return float(np.median(relative_errors(found, wanted)))


def _rows(run: Run, source: Source) -> Float[np.ndarray, "tokens features"]:
    """Features of all texts of a batch, without padding."""
    return _valid(run, np.asarray(run.captured(source).features, np.float32))


def _valid(run: Run, values: Float[np.ndarray, "batch seq channels"]) -> Float[np.ndarray, "tokens channels"]:
    return np.concatenate([values[row, : one.features_len] for row, one in enumerate(run.batch.texts)])


def angle_kinds(setting: str, *, table_rows: int | None = None) -> list[str]:
    """Return the kinds of angles to try. A table that ended before these positions is one of a single row."""
    kinds = ["float32", "bfloat16", f"table:{table_rows or 1}", setting]
    return [kind for kind in dict.fromkeys(kinds) if kind not in (EXACT, "cache")]


def name_angles(distances: dict[str, float], *, exact: float, what: str, offset: int, where: str) -> Finding:
    """Return which kind of angles reproduces what an engine gave, from its distance to each.

    Args:
        distances: median relative error to what each kind gives.
        exact: the same to exact angles.
        what: what was compared, for people.
        offset: where.
        where: whose angles, for people: "the target's".
    """
    test = f"{what} at offset {offset:,} against those of exact angles and of each other kind, median relative error"
    told = ", ".join(f"{kind} {value:.2g}" for kind, value in {"exact": exact, **distances}.items())
    evidence = [Evidence(test=test, result=told)]
    best = min(distances, key=distances.__getitem__)
    if distances[best] > min(MATCH, _BETTER * exact):
        return Finding(
            cause_id="unknown",
            sentence=f"{what} at offset {offset:,} are {exact:.2g} off, and no kind of angles that is known gives them",
            evidence=evidence,
        )
    if best.startswith("table:"):
        sentence = (
            f"{where} table of angles ends before position {offset:,} and is clamped there: beyond its end all tokens "
            "sit at one position"
        )
        return Finding(cause_id="table_end", sentence=sentence, evidence=evidence)
    fault = "rounded to bfloat16" if best == "bfloat16" else "products in float32, too coarse so far out"
    return Finding(cause_id=_ANGLES[best], sentence=f"{where} rotary angles are {fault}", evidence=evidence)


def _first_wrong(run: Run, here: Source, sound: Source) -> int:
    """First token of the longest text whose features are not the sound ones; 1 where it is the second or none is."""
    longest = max(range(len(run.batch.texts)), key=lambda row: len(run.batch.texts[row].token_ids))
    length = run.batch.texts[longest].features_len
    found, wanted = (np.asarray(run.captured(s).features[longest, :length], np.float32) for s in (here, sound))
    wrong = np.flatnonzero(relative_errors(found, wanted) > MATCH)
    return int(wrong[0]) if wrong.size else 1


def examine_target_angles(run: Run, here: Source, sound: Source) -> Finding:
    """Compare an engine's features with those of each kind of angles at the same offset."""
    first = _first_wrong(run, here, sound)
    kinds = angle_kinds(here.kind, table_rows=here.offset + first if first > 1 else None)
    found = _rows(run, here)
    distances = {kind: _distance(found, _rows(run, replace(here, kind=kind))) for kind in kinds}
    return name_angles(
        distances,
        exact=_distance(found, _rows(run, sound)),
        what="the engine's features",
        offset=here.offset,
        where="the target's",
    )


def examine_drafter_angles(run: Run, ours: Links, *, offset: int) -> Finding:
    """Compare the drafter's outputs in the engine with those of each kind of angles at the same positions."""
    found = _outputs(run, ours)
    distances = {
        kind: _distance(found, _outputs(run, replace(ours, drafter_rope=kind)))
        for kind in angle_kinds(ours.drafter_rope)
    }
    return name_angles(
        distances,
        exact=_distance(found, _outputs(run, replace(ours, drafter_rope=EXACT))),
        what="the drafter's outputs",
        offset=offset,
        where="the drafter's",
    )


def _outputs(run: Run, links: Links) -> Float[np.ndarray, "slots hidden"]:
    """The drafter's outputs at slots 1 to B-1 of every anchor of a batch."""
    parts = [np.asarray(chunk, np.float32) for row in range(len(run.batch.texts)) for chunk in run.hidden(row, links)]
    hidden = np.concatenate(parts)[:, 1:]
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
            test="each captured block of columns against every layer's output here, median relative error "
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
    """Compare features with those of the token before and after; None where neither is near."""
    distances = {}
    for shift in (-1, 1):
        found, wanted = [], []
        for row, one in enumerate(run.batch.texts):
            index = np.arange(1, one.features_len - 1)
            found.append(np.asarray(run.captured(here).features[row], np.float32)[index])
            wanted.append(np.asarray(run.captured(sound).features[row], np.float32)[index + shift])
        distances[shift] = _distance(np.concatenate(found), np.concatenate(wanted))
    best = min(distances, key=distances.__getitem__)
    if distances[best] > MATCH:
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
