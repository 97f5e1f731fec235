"""A parity in plain words: what holds, what is broken, and the cause."""

from dflash_jax.report.check_tables import accept_len_text
from dflash_jax.report.parity_record import OffsetParity, Parity
from dflash_jax.report.parity_tables import measured_text
from dflash_jax.report.sentences import Mark, Sentence, Tile, interval_words
from dflash_jax.report.tables import plural, scientific

MARKS: dict[str, Mark] = {"holds": "good", "broken": "bad", "undecided": "warn"}


def _with(parity: Parity, verdict: str) -> dict[int, OffsetParity]:
    """The offsets that have a verdict."""
    return {offset: item for offset, item in parity.offsets.items() if item.verdict == verdict}


def _listed(offsets: dict[int, OffsetParity]) -> str:
    """Offsets with their differences."""
    return "; ".join(f"{offset:,}: {measured_text(item.difference, sign='+')}" for offset, item in offsets.items())


def _margin(parity: Parity) -> str:
    """The margin in words."""
    return "" if parity.margin is None else f" within ±{parity.margin:g} accepted tokens"


def _measured_on(parity: Parity) -> str:
    """How much was measured."""
    if parity.num_prompts is None or parity.num_anchors is None:
        return ""
    return (
        f" Measured on {plural(parity.num_prompts, 'prompt')}, {plural(parity.num_anchors, 'anchor')} at each offset."
    )


def _broken(parity: Parity) -> Sentence | None:
    """The offsets where parity is broken."""
    broken = _with(parity, "broken")
    if not broken:
        return None
    text = f"accept_len differs from a sound engine's on the same anchors (paired, 95 %): {_listed(broken)}."
    if min(parity.offsets) in broken:
        text += " The smallest offset is among them, so distance alone is not the fault."
    return Sentence(mark="bad", lead="Positional parity is broken", text=text + _measured_on(parity))


def _undecided(parity: Parity) -> Sentence | None:
    """The offsets that are not decided."""
    undecided = _with(parity, "undecided")
    if not undecided:
        return None
    text = f"whether accept_len is a sound engine's{_margin(parity)} is open: {_listed(undecided)}."
    needed = [item.more_prompts_needed for item in undecided.values() if item.more_prompts_needed]
    if needed:
        text += f" About {plural(max(needed), 'more prompt')} would decide it."
    return Sentence(mark="warn", lead="Undecided", text=text + _measured_on(parity))


def _holds(parity: Parity) -> Sentence | None:
    """The offsets where parity holds."""
    held = _with(parity, "holds")
    if not held:
        return None
    named = ", ".join(f"{offset:,}" for offset in held)
    text = f"accept_len is a sound engine's{_margin(parity)} at {named}."
    if all(item.num_anchors_differing == 0 for item in held.values()):
        text += " Not one anchor has another accept_len."
    drifts = [item.feature_drift for item in held.values() if item.feature_drift is not None]
    if drifts:
        text += f" The target's features move by {scientific(max(drifts))} at most."
    if len(held) < len(parity.offsets):
        return Sentence(mark="good", lead="Holds elsewhere", text=text)
    return Sentence(mark="good", lead="Positional parity holds", text=text + _measured_on(parity))


def _cause(parity: Parity) -> Sentence | None:
    """What is to blame."""
    if parity.cause is None:
        return None
    mark: Mark = "warn" if parity.cause_id == "memorisation" or parity.verdict == "undecided" else "bad"
    return Sentence(mark=mark, lead="Cause", text=f"{parity.cause.rstrip('.')}.")


def _memory(parity: Parity) -> Sentence | None:
    """Seen against unseen prompts."""
    seen, unseen = parity.seen, parity.unseen
    if seen is None or unseen is None:
        return None
    text = f"accept_len is {accept_len_text(seen)} on prompts it was trained on, {accept_len_text(unseen)} on others."
    clear = seen.accept_len_ci95 and unseen.accept_len_ci95 and seen.accept_len_ci95.low > unseen.accept_len_ci95.high
    if clear:
        text += " The difference is memory: only the second number is to be expected of new prompts."
    return Sentence(mark="warn" if clear else "info", lead="Seen and unseen", text=text)


def parity_sentences(parity: Parity) -> list[Sentence]:
    """Everything to be said about one parity: the verdict, the cause, memory, its own warnings and notes."""
    sentences = [said for say in (_broken, _cause, _undecided, _holds, _memory) if (said := say(parity))]
    # The record's own warning of this kind is what the alarm on top says at more length.
    others = [text for text in parity.warnings if not (parity.only_seen and "TRAINED ON" in text.upper())]
    sentences += [Sentence(mark="warn", lead="Warning", text=f"{text.rstrip('.')}.") for text in others]
    return sentences + [Sentence(mark="info", lead="Note", text=f"{text.rstrip('.')}.") for text in parity.notes]


def parity_tiles(parity: Parity) -> list[Tile]:
    """A parity's key numbers."""
    holding = len(_with(parity, "holds"))
    under = "no cause needed" if parity.cause_id is None else parity.cause_id.replace("_", " ")
    under = "cause not found" if parity.cause_id in (None, "unknown") and parity.verdict == "broken" else under
    tiles = [
        Tile(name="positional parity", value=parity.verdict, under=under, mark=MARKS[parity.verdict]),
        Tile(name="offsets that hold", value=f"{holding} of {len(parity.offsets)}", under="paired by anchor"),
    ]
    differences = [item.difference for item in parity.offsets.values() if item.difference]
    if differences:
        worst = max(differences, key=lambda difference: abs(difference.mean))
        under = interval_words(worst.ci95) if worst.ci95 else "no interval"
        tiles.append(Tile(name="largest difference of accept_len", value=f"{worst.mean:+z.2f}", under=under))
    drifts = [item.feature_drift for item in parity.offsets.values() if item.feature_drift is not None]
    if drifts:
        tiles.append(Tile(name="largest drift of features", value=scientific(max(drifts)), under="relative, rms"))
    return tiles
