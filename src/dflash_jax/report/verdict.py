"""What the records say, in plain words: sentences with a mark, and the key numbers as tiles."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dflash_jax.report.records import Bucket, Check, Decode, Records, Run
from dflash_jax.report.tables import difference_text

Mark = Literal["good", "warn", "bad", "info"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One line of the verdict. `lead` names what it is about."""

    mark: Mark
    lead: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One key number: its name, its value as shown, and a line under it."""

    name: str
    value: str
    under: str
    mark: Mark = "info"


def broken_offsets(check: Check) -> list[int]:
    """Offsets whose accept_len differs from offset 0's: the paired 95 % interval of the difference leaves out 0."""
    return [offset for offset, item in check.differences.items() if item.ci95 is not None and 0.0 not in item.ci95]


def _acceptance(check: Check) -> Sentence:
    """How much is accepted on held-out prompts, and whether that is a gain."""
    main, replay = check.main, check.main.replay
    drafted = f"accepts {main.accept_len_mean:.2f} of {check.block_size - 1} drafted tokens per anchor"
    if main.accept_len_ci95:
        drafted += f" (95 % {main.accept_len_ci95.low:.2f} to {main.accept_len_ci95.high:.2f})"
    if replay is None:
        return Sentence(mark="info", lead=check.group, text=f"the target {drafted}.")
    tau = f"{replay.tau_micro:.2f} tokens per pass"
    gain = replay.tau_micro > 1
    if replay.tau_ci95:
        tau += f" (95 % {replay.tau_ci95.low:.2f} to {replay.tau_ci95.high:.2f})"
        gain = replay.tau_ci95.low > 1
    text = f"the target commits {tau} where plain decoding commits 1; over all anchors it {drafted}."
    if not check.unseen and check.seen:
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
    """Positional parity: paired differences to offset 0."""
    if not check.differences:
        if len(check.by_offset) < 2:
            return None
        text = "this check has no paired differences, so whether the offsets agree is not decided here."
        return Sentence(mark="info", lead="Offsets", text=text)
    broken = broken_offsets(check)
    if broken:
        named = "; ".join(f"{offset:,}: {difference_text(check.differences[offset])}" for offset in broken)
        text = f"accept_len differs from offset 0's on the same tokens (paired difference, 95 % interval): {named}."
        return Sentence(mark="bad", lead="Positional parity is broken", text=text)
    widest = max((max(abs(d.ci95.low), abs(d.ci95.high)) for d in check.differences.values() if d.ci95), default=None)
    if any(difference.ci95 is None for difference in check.differences.values()) or widest is None:
        return Sentence(
            mark="info", lead="Offsets", text="a difference has no interval, so parity is not decided here."
        )
    largest = max(check.differences, key=lambda offset: abs(check.differences[offset].mean))
    text = (
        f"every offset equals offset 0 within its 95 % interval; the largest paired difference is"
        f" {check.differences[largest].mean:+.3f} (at {largest:,}), and one beyond ±{widest:.3f} is excluded."
    )
    return Sentence(mark="good", lead="Positional parity holds", text=text)


def _memory(check: Check) -> Sentence | None:
    """Seen against unseen prompts."""
    if check.seen is None or check.unseen is None:
        return None
    seen, unseen = check.seen, check.unseen
    text = (
        f"accept_len is {seen.accept_len_mean:.2f} on prompts it was trained on and {unseen.accept_len_mean:.2f} on"
        f" held-out ones ({_prompts(seen)} and {_prompts(unseen)} prompts)."
    )
    return Sentence(mark="info", lead="Seen and unseen", text=text)


def _prompts(bucket: Bucket) -> str:
    """A group's number of prompts."""
    return "?" if bucket.num_prompts is None else f"{bucket.num_prompts:,}"


def _equality(decode: Decode) -> Sentence | None:
    """Whether decoding with the drafter gave plain decoding's tokens."""
    if decode.tokens_equal is None:
        return None
    prompts = f"{decode.num_prompts:,} prompts"
    if decode.tokens_equal:
        text = f"all {decode.num_tokens:,} tokens decoded with the drafter equal plain decoding's, on {prompts}."
        return Sentence(mark="good", lead="Decoding is lossless", text=text)
    text = f"tokens decoded with the drafter differ from plain decoding's, on {prompts}."
    return Sentence(mark="bad", lead="Decoding is not lossless", text=text)


def _speed(decode: Decode) -> Sentence:
    """Decoding's speed and tau."""
    text = (
        f"decoding commits {decode.tau_micro:.2f} tokens per pass (tau, micro) at {decode.tokens_per_s:,.1f} tokens/s"
    )
    if decode.speedup is None or decode.plain_tokens_per_s is None:
        return Sentence(mark="info", lead="Speed", text=text + ".")
    text += f"; plain decoding runs at {decode.plain_tokens_per_s:,.1f}: a speed-up of {decode.speedup:.2f}×."
    if decode.speedup < 1 < decode.tau_micro:
        text += " Fewer passes do not pay yet: on this machine a pass over a block costs more than it saves."
    return Sentence(mark="good" if decode.speedup > 1 else "warn", lead="Speed", text=text)


def _training(run: Run) -> Sentence | None:
    """Only a curve that diverged is worth a sentence here."""
    broken = next((step.step for step in run.steps if step.loss is None), None)
    if broken is None:
        return None
    return Sentence(
        mark="bad", lead="Training diverged", text=f"the loss of {run.label} is not finite at step {broken:,}."
    )


def write_verdict(records: Records) -> list[Sentence]:
    """The sentences, most important first; each names its record where there are several of the kind."""

    def named(sentence: Sentence | None, label: str, number: int) -> Iterator[Sentence]:
        if sentence:
            lead = sentence.lead if number == 1 else f"{label}: {sentence.lead}"
            yield Sentence(mark=sentence.mark, lead=lead, text=sentence.text)

    sentences: list[Sentence] = []
    for check in records.checks:
        for about in (_acceptance, _trained, _offsets, _memory):
            sentences += named(about(check), check.label, len(records.checks))
    for decode in records.decodes:
        for say in (_equality, _speed):
            sentences += named(say(decode), decode.label, len(records.decodes))
    for run in records.runs:
        sentences += named(_training(run), run.label, len(records.runs))
    return sentences


def check_tiles(check: Check) -> list[Tile]:
    """A check's key numbers."""
    main = check.main
    tiles: list[Tile] = []
    if main.replay:
        interval = main.replay.tau_ci95
        under = f"95 % {interval.low:.2f} to {interval.high:.2f}" if interval else "micro, along the chain"
        tiles.append(Tile(name=f"replay tau, {check.group.lower()}", value=f"{main.replay.tau_micro:.2f}", under=under))
    interval = main.accept_len_ci95
    under = f"95 % {interval.low:.2f} to {interval.high:.2f}" if interval else f"of {check.block_size - 1} drafted"
    tiles.append(Tile(name="accept_len, all anchors", value=f"{main.accept_len_mean:.2f}", under=under))
    tiles.append(
        Tile(name="token_acc", value=f"{main.token_acc_mean:.1%}", under=f"of {check.block_size - 1} drafted slots")
    )
    if check.differences:
        holding = len(check.differences) - len(broken_offsets(check))
        mark: Mark = "good" if holding == len(check.differences) else "bad"
        value = f"{holding} of {len(check.differences)}"
        tiles.append(Tile(name="offsets at parity with 0", value=value, under="paired differences", mark=mark))
    return tiles


def decode_tiles(decode: Decode) -> list[Tile]:
    """A decode record's key numbers."""
    tiles = [Tile(name="decode tau", value=f"{decode.tau_micro:.2f}", under=f"micro, {decode.num_prompts:,} prompts")]
    if decode.speedup is not None:
        mark: Mark = "good" if decode.speedup > 1 else "warn"
        under = f"{decode.tokens_per_s:,.0f} tokens/s"
        tiles.append(Tile(name="speed-up over plain", value=f"{decode.speedup:.2f}×", under=under, mark=mark))
    if decode.tokens_equal is not None:
        value, mark = ("equal", "good") if decode.tokens_equal else ("differ", "bad")
        tiles.append(Tile(name="tokens against plain", value=value, under=f"{decode.num_tokens:,} tokens", mark=mark))
    return tiles


def run_tiles(run: Run) -> list[Tile]:
    """A run's key numbers, of its last logged step."""
    last = run.steps[-1]
    loss = "not finite" if last.loss is None else f"{last.loss:.2f}"
    tiles = [
        Tile(
            name="training loss",
            value=loss,
            under=f"at step {last.step:,}",
            mark="bad" if last.loss is None else "info",
        )
    ]
    if last.accuracy is not None:
        tiles.append(Tile(name="training accuracy", value=f"{last.accuracy:.1%}", under=f"at step {last.step:,}"))
    return tiles
