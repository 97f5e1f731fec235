"""Decoding in plain words and in a table: whether it lost anything, what rounding explains, how fast it was."""

from dflash_jax.report.fields import Interval
from dflash_jax.report.run_record import Decode, Flip
from dflash_jax.report.sentences import Mark, Sentence, Tile, interval_words
from dflash_jax.report.tables import MOST_ROWS, NONE, Table, plural

MOST_NAMED = 3


def _margin(flip: Flip) -> str:
    """How near a tie the two tokens are, against what rounding can do."""
    if flip.margin is None:
        return "a filter leaves one of the two tokens out"
    return f"a margin of {flip.margin:.3g}, where rounding moves margins by up to {flip.rounding:.3g}"


def _share(decode: Decode, flips: tuple[Flip, ...]) -> str:
    """How many prompts differ."""
    return f"{len(flips):,} of {plural(decode.num_prompts, 'prompt')}"


def _rounding(decode: Decode, flips: tuple[Flip, ...]) -> Sentence:
    """Every difference is a near tie that bfloat16 decides the one way or the other."""
    worst = max(flips, key=lambda flip: (flip.margin or 0.0) / flip.rounding if flip.rounding else 0.0)
    equal = decode.num_prompts - len(flips)
    text = (
        f"{_share(decode, flips)} {'flips' if len(flips) == 1 else 'flip'} to another token than plain decoding's, and"
        " every flip is explained by rounding: the two tokens are nearly tied, the margin between them below the"
        f" difference measured between verification and plain decoding (the widest: {_margin(worst)})."
    )
    text += f" The other {equal:,} are equal, token for token." if equal else ""
    return Sentence(mark="good", lead="Decoding is lossless up to bfloat16 rounding", text=text)


def _differs(decode: Decode) -> Sentence:
    """Differences that nothing excuses."""
    flips = decode.flips or ()
    lead = "Decoding is not lossless"
    if not flips:
        text = f"tokens decoded with the drafter differ from plain decoding's, on {decode.num_prompts:,} prompts."
        return Sentence(mark="bad", lead=lead, text=text)
    told = [flip for flip in flips if not flip.explained] or list(flips)
    text = f"{_share(decode, flips)} {'differs' if len(flips) == 1 else 'differ'} from plain decoding, and "
    if decode.dtype == "bfloat16":
        text += f"rounding does not explain {len(told):,} of them: "
    else:
        text += f"in {decode.dtype or 'exact arithmetic'} rounding is no excuse: "
    text += "; ".join(f"{flip.id} at new token {flip.index:,} ({_margin(flip)})" for flip in told[:MOST_NAMED])
    text += f"; and {len(told) - MOST_NAMED:,} more." if len(told) > MOST_NAMED else "."
    return Sentence(mark="bad", lead=lead, text=text)


def _equality(decode: Decode) -> Sentence | None:
    """Whether decoding with the drafter gave plain decoding's tokens."""
    if decode.tokens_equal is None:
        return None
    if decode.only_rounding:
        return _rounding(decode, decode.flips or ())
    if not decode.tokens_equal:
        return _differs(decode)
    text = (
        f"all {decode.num_tokens:,} tokens decoded with the drafter equal plain decoding's, on"
        f" {decode.num_prompts:,} prompts."
    )
    return Sentence(mark="good", lead="Decoding is lossless", text=text)


def _speed_mark(speedup: float, interval: Interval | None) -> Mark:
    """Whether it is a gain, as surely as is known."""
    return "good" if (interval.low if interval else speedup) > 1 else "warn"


def _speed(decode: Decode) -> Sentence:
    """Decoding's speed and tau."""
    text = (
        f"decoding commits {decode.tau_micro:.2f} tokens per pass (tau, micro) at {decode.tokens_per_s:,.1f} tokens/s"
    )
    if decode.speedup is None or decode.plain_tokens_per_s is None:
        return Sentence(mark="info", lead="Speed", text=text + ".")
    interval = decode.speedup_ci95
    text += f"; plain decoding runs at {decode.plain_tokens_per_s:,.1f}: a speed-up of {decode.speedup:.2f}×"
    text += f" ({interval_words(interval)})." if interval else "."
    if decode.speedup < 1 < decode.tau_micro:
        text += " Fewer passes do not pay yet: on this machine a pass over a block costs more than it saves."
    return Sentence(mark=_speed_mark(decode.speedup, interval), lead="Speed", text=text)


def decode_sentences(decode: Decode) -> list[Sentence]:
    """Everything to be said about one decode record."""
    return [sentence for sentence in (_equality(decode), _speed(decode)) if sentence]


def _equality_tile(decode: Decode) -> Tile:
    """Equal, equal but for rounding, or different."""
    value, under, mark = "equal", f"{decode.num_tokens:,} tokens", "good"
    if decode.only_rounding:
        value = f"{len(decode.flips or ()):,} of {decode.num_prompts:,} flip"
        under = "rounding explains every one"
    elif not decode.tokens_equal:
        value, mark = "differ", "bad"
        under = f"{len(decode.flips):,} of {plural(decode.num_prompts, 'prompt')}" if decode.flips else under
    return Tile(name="tokens against plain", value=value, under=under, mark="good" if mark == "good" else "bad")


def decode_tiles(decode: Decode) -> list[Tile]:
    """A decode record's key numbers."""
    tiles = [Tile(name="decode tau", value=f"{decode.tau_micro:.2f}", under=f"micro, {decode.num_prompts:,} prompts")]
    if decode.speedup is not None:
        mark = _speed_mark(decode.speedup, decode.speedup_ci95)
        under = f"{decode.tokens_per_s:,.0f} tokens/s"
        under += f", {interval_words(decode.speedup_ci95)}" if decode.speedup_ci95 else ""
        tiles.append(Tile(name="speed-up over plain", value=f"{decode.speedup:.2f}×", under=under, mark=mark))
    if decode.tokens_equal is not None:
        tiles.append(_equality_tile(decode))
    return tiles


def flips_table(decode: Decode) -> Table | None:
    """One row per prompt that differs, those that rounding does not explain first. None where none does."""
    if not decode.flips:
        return None
    ordered = sorted(decode.flips, key=lambda flip: flip.explained)

    def row(flip: Flip) -> tuple[str, ...]:
        return (
            flip.id,
            "yes" if flip.explained else "NO",
            "yes" if flip.reproduced else "no",
            flip.plain,
            flip.speculative,
            f"{flip.index:,}",
            NONE if flip.margin is None else f"{flip.margin:.3g}",
            f"{flip.rounding:.3g}",
        )

    notes = [
        "Of each prompt the first token that differs; it counts the new ones from 0. Margin: by how much either"
        " way prefers its own token, the larger of the two. Rounding: how far it moves a margin at most, twice the"
        " largest difference of any score between the two ways at the other tokens of the text. Explained: the first is"
        " within the second. Again: computing both ways once more gave both tokens again."
    ]
    if len(ordered) > MOST_ROWS:
        notes.append(f"{len(ordered) - MOST_ROWS:,} more prompts are not shown.")
    columns = ("prompt", "explained", "again", "plain token", "with the drafter", "at", "margin", "rounding")
    rows = tuple(map(row, ordered[:MOST_ROWS]))
    title = f"Where tokens differ from plain decoding: {decode.label}"
    return Table(title=title, columns=columns, rows=rows, notes=tuple(notes), left=5)
