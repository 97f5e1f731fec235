"""What the records say, in plain words: sentences with a mark, and the key numbers as tiles."""

from collections.abc import Iterator
from dataclasses import dataclass

from dflash_jax.report import check_tables, check_verdict, parity_verdict
from dflash_jax.report.agree_record import agree_sentences, agree_tiles
from dflash_jax.report.alarm import FLAG
from dflash_jax.report.records import Records
from dflash_jax.report.run_record import Decode, Run
from dflash_jax.report.sentences import Mark, Sentence, Tile


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


def _training(run: Run) -> Sentence:
    """How the loss went, or where it diverged."""
    broken = next((step.step for step in run.steps if step.loss is None), None)
    if broken is not None:
        text = f"the loss of {run.label} is not finite at step {broken:,}."
        return Sentence(mark="bad", lead="Training diverged", text=text)
    first, last = run.steps[0], run.steps[-1]
    text = f"the loss of {run.label} went from {first.loss:.2f} to {last.loss:.2f} in {last.step:,} steps"
    text += f"; the last batch's accuracy is {last.accuracy:.1%}" if last.accuracy is not None else ""
    text += ". A training loss says nothing about prompts not trained on: `dflash-jax check` does."
    return Sentence(mark="info", lead="Training", text=text)


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
    tiles.append(
        Tile(name="drafters kept", value=f"{len(run.records):,}", under=", ".join(list(run.records)[-2:]) or "none")
    )
    return tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What is said of one record, or of all of them where no kind occurs twice (the heading is then empty).

    `flag` is a warning in a few words, beside the heading.
    """

    heading: str
    sentences: tuple[Sentence, ...]
    tiles: tuple[Tile, ...]
    flag: str = ""


def _decode_sentences(decode: Decode) -> list[Sentence]:
    """Everything to be said about one decode record."""
    return [sentence for sentence in (_equality(decode), _speed(decode)) if sentence]


def _checks_together(records: Records) -> Iterator[Group]:
    """What several checks say together."""
    said = [check_verdict.comparison_sentence(item) for item in records.comparisons]
    if memory := check_verdict.memory_sentence(records.checks):
        said.append(memory)
    if apart := check_verdict.side_by_side_sentence(records.checks, records.comparisons):
        said.append(apart)
    if said:
        yield Group(heading="Comparison", sentences=tuple(said), tiles=())


def _of_each(records: Records) -> Iterator[Group]:
    """A group per record."""
    for parity in records.parities:
        sentences, tiles = parity_verdict.parity_sentences(parity), parity_verdict.parity_tiles(parity)
        flag = FLAG if parity.only_seen else ""
        yield Group(heading=f"Parity: {parity.label}", sentences=tuple(sentences), tiles=tuple(tiles), flag=flag)
    yield from _checks_together(records)
    for name, check in zip(check_tables.lettered_labels(records.checks), records.checks, strict=True):
        sentences, tiles = check_verdict.check_sentences(check), check_verdict.check_tiles(check)
        flag = FLAG if check.only_seen else ""
        yield Group(heading=name, sentences=tuple(sentences), tiles=tuple(tiles), flag=flag)
    for agree in records.agreements:
        sentences, tiles = agree_sentences(agree), agree_tiles(agree)
        yield Group(heading=f"Agreement: {agree.label}", sentences=tuple(sentences), tiles=tuple(tiles))
    for decode in records.decodes:
        yield Group(
            heading=f"Decoding: {decode.label}",
            sentences=tuple(_decode_sentences(decode)),
            tiles=tuple(decode_tiles(decode)),
        )
    for run in records.runs:
        yield Group(heading=f"Training: {run.label}", sentences=(_training(run),), tiles=tuple(run_tiles(run)))


def write_verdict(records: Records) -> list[Group]:
    """What the records say, most important first: one group where no kind of record occurs twice, else one for each."""
    groups = list(_of_each(records))
    if (
        max(map(len, (records.parities, records.checks, records.agreements, records.decodes, records.runs))) > 1
        or not groups
    ):
        return groups
    sentences = tuple(sentence for group in groups for sentence in group.sentences)
    return [Group(heading="", sentences=sentences, tiles=tuple(tile for group in groups for tile in group.tiles))]
