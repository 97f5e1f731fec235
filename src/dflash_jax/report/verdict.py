"""What the records say, in plain words: sentences with a mark, and the key numbers as tiles."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dflash_jax.report import check_tables, check_verdict, parity_verdict
from dflash_jax.report.agree_record import agree_sentences, agree_tiles
from dflash_jax.report.alarm import FLAG
from dflash_jax.report.decode_verdict import decode_sentences, decode_tiles
from dflash_jax.report.records import Records
from dflash_jax.report.run_verdict import run_sentences, run_tiles
from dflash_jax.report.sentences import Sentence, Tile

MOST_TILED = 6
"""Groups with tiles; more would bury the sentences, and every number is in a table too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What is said of one record, or of all of them where no kind occurs twice (the heading is then empty).

    `flag` is a warning in a few words, beside the heading.
    """

    heading: str
    sentences: tuple[Sentence, ...]
    tiles: tuple[Tile, ...] = ()
    flag: str = ""


def _checks_together(records: Records) -> Iterator[Group]:
    """What several checks say together."""
    said = [check_verdict.comparison_sentence(item) for item in records.comparisons]
    if memory := check_verdict.memory_sentence(records.checks):
        said.append(memory)
    if apart := check_verdict.side_by_side_sentence(records.checks, records.comparisons):
        said.append(apart)
    if said:
        yield Group(heading="Comparison", sentences=tuple(said))


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
        sentences, tiles = decode_sentences(decode), decode_tiles(decode)
        yield Group(heading=f"Decoding: {decode.label}", sentences=tuple(sentences), tiles=tuple(tiles))
    for run in records.runs:
        sentences, tiles = run_sentences(run), run_tiles(run)
        yield Group(heading=f"Training: {run.label}", sentences=tuple(sentences), tiles=tuple(tiles))


def write_verdict(records: Records) -> list[Group]:
    """What the records say, most important first: one group where no kind of record occurs twice, else one for each."""
    groups = list(_of_each(records))
    if (
        max(map(len, (records.parities, records.checks, records.agreements, records.decodes, records.runs))) > 1
        or not groups
    ):
        return groups if len(groups) <= MOST_TILED else [replace(group, tiles=()) for group in groups]
    sentences = tuple(sentence for group in groups for sentence in group.sentences)
    return [Group(heading="", sentences=sentences, tiles=tuple(tile for group in groups for tile in group.tiles))]
