"""From what was measured to a cause: which link is guilty, and what is wrong with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dflash_jax.parity.chain import Chain, Links, Outcome, Run
from dflash_jax.parity.engine import Engine
from dflash_jax.parity.examine import (
    Evidence,
    Finding,
    examine_drafter_angles,
    examine_labels,
    examine_layers,
    examine_positions,
    examine_rows,
    examine_target_angles,
)
from dflash_jax.parity.measure import mean_accepted, paired_sums, whole_blocks
from dflash_jax.parity.texts import Text, TextBatch
from dflash_jax.parity.verdict import Difference, judge

_WHAT = {
    "features": "the target's features",
    "labels": "the target's labels",
    "target": "the target's features and labels",
    "positions": "the drafter's positions",
    "drafter": "the drafter's angles",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What accept_len becomes under some exchanged links, on the same anchors.

    Attributes:
        accepted: accept_len by the exchange's name.
        difference: to the reference, by the exchange's name.
    """

    accepted: Mapping[str, float]
    difference: Mapping[str, Difference]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """What is to blame; `cause_id` and `sentence` are None where nothing is."""

    cause_id: str | None = None
    sentence: str | None = None
    evidence: list[Evidence] = field(default_factory=list)


def exchange(
    chain: Chain, batches: Sequence[TextBatch], choices: Mapping[str, Links], sound: Links, **judging: Any
) -> Exchange:
    """Run some texts through several choices of links and compare each with the reference.

    Args:
        chain: the models.
        batches: the texts.
        choices: links by name.
        sound: the reference's links.
        judging: margin, samples and seed of `judge`.
    """
    texts: list[Text] = []
    reference: list[Outcome] = []
    outcomes: dict[str, list[Outcome]] = {name: [] for name in choices}
    for batch in batches:
        run = Run(chain, batch)
        reference += run.outcomes(sound)
        for name, links in choices.items():
            outcomes[name] += run.outcomes(links)
        texts += batch.texts
    masks, _ = whole_blocks(texts, reference)
    return Exchange(
        accepted={name: mean_accepted(some, masks) for name, some in outcomes.items()},
        difference={
            name: judge(paired_sums(texts, some, reference, masks), **judging) for name, some in outcomes.items()
        },
    )


def guilty_links(spoils: Exchange) -> list[str]:
    """Return the links that spoil a sound chain each by itself, the worst first; at least one.

    Where none does clearly, the one that changes most is named: faults that only matter together.
    """
    size = {name: abs(difference.mean) for name, difference in spoils.difference.items()}
    ranked = sorted(size, key=lambda name: -size[name])
    return [name for name in ranked if spoils.difference[name].verdict == "broken"] or ranked[:1]


def _features_finding(chain: Chain, run: Run, engine: Engine, offset: int) -> Finding:
    """What is wrong with features: another token's or layer's, other angles, another target."""
    sound, near, here = engine.reference.features, engine.links(engine.near).features, engine.links(offset).features
    moved = examine_rows(run, near, sound)
    if moved is not None:
        return moved
    layers = examine_layers(chain, run, near, sound=sound)
    if layers is not None and layers.cause_id == "capture_layers_shifted":
        return layers
    angles = examine_target_angles(run, here, sound, offsets=engine.offsets)
    if angles.cause_id == "unknown" and layers is not None:
        return Finding(cause_id=layers.cause_id, sentence=layers.sentence, evidence=layers.evidence + angles.evidence)
    return angles


def _finding(link: str, chain: Chain, run: Run, engine: Engine, offset: int) -> Finding:
    ours = engine.links(offset)
    if link == "features":
        return _features_finding(chain, run, engine, offset)
    if link == "labels":
        return examine_labels(run, ours.labels, engine.reference.labels)
    if link == "positions":
        return examine_positions(ours.context_start, ours.block_start, offset=offset)
    return examine_drafter_angles(run, {each: engine.spoils(each)["drafter"] for each in engine.offsets})


def engine_cause(
    chain: Chain, engine: Engine, batch: TextBatch, *, offset: int, swaps: Exchange, spoils: Exchange
) -> Cause:
    """Return what is wrong with the engine at an offset where it is broken.

    Args:
        chain: the models.
        engine: the engine.
        batch: texts for the direct tests.
        offset: where.
        swaps: the engine's chain with links mended.
        spoils: the sound chain with links of the engine.
    """
    guilty = guilty_links(spoils)
    if "features" in guilty and "labels" in guilty:
        guilty.remove("labels")  # both are the target's: one cause
    run = Run(chain, batch)
    findings = [_finding(link, chain, run, engine, offset) for link in guilty]
    evidence = [_spoil_evidence(spoils, offset), *(item for finding in findings for item in finding.evidence)]
    sentences = [finding.sentence for finding in findings]
    mended = "target" if guilty[0] in ("features", "labels") else guilty[0]
    sentences.append(
        f"at offset {offset:,} accept_len is {swaps.accepted['none']:.3f} against the reference's "
        f"{swaps.accepted['all']:.3f}, and {swaps.accepted[mended]:.3f} with {_WHAT[mended]} mended"
    )
    known = [finding.cause_id for finding in findings if finding.cause_id != "unknown"]
    return Cause(cause_id=(known or ["unknown"])[0], sentence="; ".join(sentences), evidence=evidence)


def _spoil_evidence(spoils: Exchange, offset: int) -> Evidence:
    told = ", ".join(
        f"{_WHAT[name]} {difference.mean:+.3f} [{difference.ci95[0]:+.3f}, {difference.ci95[1]:+.3f}]"
        for name, difference in spoils.difference.items()
    )
    return Evidence(
        test=f"one link at a time from the engine at offset {offset:,} in the sound chain: accept_len changes by",
        result=told,
    )


def probe_cause(probes: Exchange, *, layers: Sequence[int], reference: float) -> Cause:
    """Return what the drafter was trained for, where a moved reference accepts more than the sound one."""
    better = {
        name: difference.mean
        for name, difference in probes.difference.items()
        if difference.verdict == "broken" and difference.mean > 0
    }
    if not better:
        return Cause()
    name = max(better, key=better.__getitem__)
    shift = int(name[-2:])
    told = ", ".join(f"{each} {value:.3f}" for each, value in probes.accepted.items())
    evidence = [Evidence(test=f"the reference ({reference:.3f}) with layers or block moved by one", result=told)]
    found = f"the drafter accepts {probes.accepted[name]:.3f} where it is given {{}}, and {reference:.3f} as it is"
    if name.startswith("layers"):
        others = ", ".join(str(layer + shift) for layer in layers)
        return Cause(
            cause_id="capture_layers_shifted",
            sentence=found.format(f"layers {others}")
            + f": it was trained on those, its target_layer_ids {', '.join(map(str, layers))} are moved by {-shift:+d}",
            evidence=evidence,
        )
    where = "after" if shift > 0 else "before"
    return Cause(
        cause_id="offset_off_by_one",
        sentence=found.format(f"block slots one position {where} their place")
        + ": it was trained with positions off by one",
        evidence=evidence,
    )
