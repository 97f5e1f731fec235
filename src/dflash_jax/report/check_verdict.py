"""A check in plain words: how much is accepted, whether the offsets agree, what is memory."""

from collections.abc import Sequence

from dflash_jax.report.check_record import Bucket, Check, Comparison, Difference
from dflash_jax.report.check_tables import difference_text, first_offset
from dflash_jax.report.sentences import Mark, Sentence, Tile, interval_words
from dflash_jax.report.tables import with_interval

MARGIN = 0.1
"""Accepted tokens: a difference within it is of no account. The same as parity's default (docs/design/005)."""


def offset_verdict(difference: Difference) -> str:
    """`holds`, `broken` or `undecided`: the equivalence test of docs/design/005 on a paired difference.

    Worked, margin 0.1: [-0.02, +0.03] holds; [+0.01, +0.03] holds, since so little is of no account; +0.2 [+0.1, +0.3]
    is broken; +0.05 [-0.1, +0.2] is undecided.
    """
    interval = difference.ci95
    if interval is None:
        return "undecided"
    if interval.low >= -MARGIN and interval.high <= MARGIN:
        return "holds"
    return "broken" if 0.0 not in interval and abs(difference.mean) > MARGIN else "undecided"


def _with(check: Check, verdict: str) -> dict[int, Difference]:
    """The offsets that have a verdict."""
    return {offset: item for offset, item in check.differences.items() if offset_verdict(item) == verdict}


def _acceptance(check: Check) -> Sentence:
    """How much is accepted on held-out prompts, and whether that is a gain."""
    main, replay = check.main, check.main.replay
    drafted = f"accepts {main.accept_len_mean:.2f} of {check.block_size - 1} drafted tokens per anchor"
    if main.accept_len_ci95:
        drafted += f" ({interval_words(main.accept_len_ci95)})"
    if replay is None:
        mark: Mark = "warn" if check.only_seen else "info"
        return Sentence(mark=mark, lead=check.group, text=f"the target {drafted}.")
    tau = f"{replay.tau_micro:.2f} tokens per pass"
    gain = replay.tau_micro > 1
    if replay.tau_ci95:
        tau += f" ({interval_words(replay.tau_ci95)})"
        gain = replay.tau_ci95.low > 1
    text = f"the target commits {tau} where plain decoding commits 1; over all anchors it {drafted}."
    if check.only_seen:
        text += " No held-out prompt was checked, so this may be memory, not skill."
        return Sentence(mark="warn", lead=check.group, text=text)
    return Sentence(mark="good" if gain else "warn", lead=check.group, text=text)


def _trained(check: Check) -> Sentence | None:
    """The drafter against an untrained one."""
    untrained = check.untrained
    if untrained is None:
        return None
    text = f"an untrained drafter of the same shape has accept_len {untrained.accept_len_mean:.2f}"
    better = check.main.accept_len_mean > untrained.accept_len_mean
    if check.main.accept_len_ci95 and untrained.accept_len_ci95:
        better = check.main.accept_len_ci95.low > untrained.accept_len_ci95.high
    if untrained.replay:
        text += f" and commits {untrained.replay.tau_micro:.2f} tokens per pass"
    text += f"; this one has {check.main.accept_len_mean:.2f}, " + (
        "clearly more." if better else "which is not clearly more."
    )
    return Sentence(mark="good" if better else "bad", lead="Learned", text=text)


def _offsets(check: Check) -> Sentence | None:
    """Whether the offsets agree, by paired differences to the smallest one."""
    if not check.differences:
        if len(check.by_offset) < 2:
            return None
        text = "this check has no paired differences, so whether the offsets agree is not decided here."
        return Sentence(mark="info", lead="Offsets", text=text)
    broken, undecided = _with(check, "broken"), _with(check, "undecided")
    if broken or undecided:
        listed = broken or undecided
        named = "; ".join(f"{offset:,}: {difference_text(item)}" for offset, item in listed.items())
        if broken:
            text = (
                f"accept_len differs from offset {first_offset(check):,}'s on the same tokens (paired, 95 %): {named}."
            )
            text += " `dflash-jax parity` finds the cause."
            return Sentence(mark="bad", lead="The offsets disagree", text=text)
        text = f"more prompts are needed to tell whether the offsets agree within ±{MARGIN:g} accepted tokens: {named}."
        return Sentence(mark="warn", lead="Offsets are undecided", text=text)
    return Sentence(mark="good", lead="The offsets agree", text=_agreement(check))


def _agreement(check: Check) -> str:
    """How well the offsets agree."""
    items = list(check.differences.values())
    anchors = sum(item.num_anchors or 0 for item in items)
    if anchors and all(item.num_anchors_differing == 0 for item in items):
        return (
            f"not one of the {anchors:,} anchors has another accept_len than the same anchor at offset"
            f" {first_offset(check):,}."
        )
    largest = max(check.differences, key=lambda offset: abs(check.differences[offset].mean))
    text = (
        f"accept_len equals offset {first_offset(check):,}'s within ±{MARGIN:g} at every offset; the largest paired"
        f" difference is {difference_text(check.differences[largest])} (at {largest:,})."
    )
    if any(item.ci95 and 0.0 not in item.ci95 for item in items):
        text += " Small, but not chance: the interval of one leaves out 0."
    return text


def _memory(check: Check) -> Sentence | None:
    """Seen against unseen prompts."""
    if check.seen is None or check.unseen is None:
        return None
    seen, unseen = check.seen, check.unseen
    text = (
        f"accept_len is {seen.accept_len_mean:.2f} on prompts it was trained on and {unseen.accept_len_mean:.2f} on"
        f" held-out ones ({_prompts(seen)} and {_prompts(unseen)} prompts)."
    )
    if seen.accept_len_ci95 and unseen.accept_len_ci95 and seen.accept_len_ci95.low > unseen.accept_len_ci95.high:
        text += " The difference is memory: only the second number is to be expected of new prompts."
        return Sentence(mark="warn", lead="Seen and unseen", text=text)
    return Sentence(mark="info", lead="Seen and unseen", text=text)


def _prompts(bucket: Bucket) -> str:
    """A group's number of prompts."""
    return "?" if bucket.num_prompts is None else f"{bucket.num_prompts:,}"


def check_sentences(check: Check) -> list[Sentence]:
    """Everything to be said about one check, its own warnings last."""
    sentences = [sentence for say in (_acceptance, _trained, _offsets, _memory) if (sentence := say(check))]
    # The record's own warning of this kind is what the alarm on top says at more length.
    others = [text for text in check.warnings if not (check.only_seen and "TRAINED ON" in text.upper())]
    return sentences + [Sentence(mark="warn", lead="Warning", text=f"{text}.") for text in others]


def comparison_sentence(comparison: Comparison) -> Sentence:
    """One comparison, by its accept_len, or the first metric that it has."""
    lead = f"{comparison.b} against {comparison.a}"
    if not comparison.metrics:
        return Sentence(mark="info", lead=lead, text=comparison.verdict or "nothing was compared.")
    name, metric = next(iter(comparison.metrics.items()))
    kind = "paired by anchor" if comparison.paired else "not paired: other prompts"
    difference = with_interval(metric.difference, metric.ci95, sign="+")
    said = comparison.verdict.rstrip(".") if comparison.verdict else f"a difference of {difference}"
    text = f"{name} {metric.a:.3f} → {metric.b:.3f} ({kind}): {said}."
    if metric.ci95 is None or 0.0 in metric.ci95:
        return Sentence(mark="info", lead=lead, text=text)
    return Sentence(mark="good" if metric.difference > 0 else "warn", lead=lead, text=text)


def side_by_side_sentence(checks: Sequence[Check], comparisons: Sequence[Comparison]) -> Sentence | None:
    """What several checks given side by side do not say."""
    if len(checks) < 2 or comparisons:
        return None
    text = (
        "these checks were made apart, so each mean has its own interval and no difference has one. `check"
        " --compare-drafters` or `--compare-caches` pairs them by anchor and gives it."
    )
    return Sentence(mark="info", lead="Side by side", text=text)


def memory_sentence(checks: Sequence[Check]) -> Sentence | None:
    """That a drafter's fall from one check to another is memory: seen prompts there, others here.

    None where no drafter has both, or their intervals meet.
    """
    for seen in checks:
        for unseen in checks:
            same = seen.drafter is not None and seen.drafter == unseen.drafter
            if not (same and seen.only_seen and unseen.unseen):
                continue
            high, low = seen.total, unseen.unseen
            if not (
                high.accept_len_ci95 and low.accept_len_ci95 and high.accept_len_ci95.low > low.accept_len_ci95.high
            ):
                continue
            text = (
                f"accept_len is {high.accept_len_mean:.2f} on prompts it was trained on ({seen.label}) and"
                f" {low.accept_len_mean:.2f} on others ({unseen.label}): memory."
            )
            if unseen.differences and len(_with(unseen, "holds")) == len(unseen.differences):
                text += " The offsets of the second check agree with each other, so positions are not the cause."
            return Sentence(mark="warn", lead="Seen and unseen", text=text)
    return None


def check_tiles(check: Check) -> list[Tile]:
    """A check's key numbers."""
    main = check.main
    group = check.group.lower()
    mark: Mark = "bad" if check.only_seen else "info"
    tiles: list[Tile] = []
    if main.replay:
        interval = main.replay.tau_ci95
        under = interval_words(interval) if interval else "micro, along the chain"
        tiles.append(Tile(name=f"replay tau, {group}", value=f"{main.replay.tau_micro:.2f}", under=under, mark=mark))
    interval = main.accept_len_ci95
    under = interval_words(interval) if interval else f"of {check.block_size - 1} drafted"
    value = f"{main.accept_len_mean:.2f}"
    tiles.append(Tile(name=f"accept_len, all anchors, {group}", value=value, under=under, mark=mark))
    under = f"of {check.block_size - 1} drafted slots"
    tiles.append(Tile(name=f"token_acc, {group}", value=f"{main.token_acc_mean:.1%}", under=under, mark=mark))
    if check.differences:
        broken, undecided = _with(check, "broken"), _with(check, "undecided")
        holding = len(check.differences) - len(broken) - len(undecided)
        mark = "bad" if broken else "warn" if undecided else "good"
        value = f"{holding} of {len(check.differences)}"
        under = f"within ±{MARGIN:g}, paired"
        tiles.append(Tile(name=f"offsets that agree with {first_offset(check):,}", value=value, under=under, mark=mark))
    return tiles
