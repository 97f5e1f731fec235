"""Text while it is decoded, block by block, in whole characters, told apart by who found it: drafter or target."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_jax.decode import Decoded, Decoder
from dflash_jax.text import TextStream, Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPiece:
    """A part of a text that came out at once: what one block added of one kind.

    Attributes:
        id: the prompt's.
        text: whole characters; "" where the tokens end inside one.
        tokens: how many tokens came; 0 in the last piece, which holds what was left of an unfinished character.
        drafted: whether the drafter guessed it and the target accepted it; else it is the target's own.
        ends_block: whether a block, or the token of the prompt's own pass, ends here.
        ends_text: whether it is the last piece of its prompt.
    """

    id: str
    text: str
    tokens: int = 0
    drafted: bool = False
    ends_block: bool = False
    ends_text: bool = False


def text_pieces(
    parts: Iterable[Decoded], tokenizer: Tokenizer, *, prompt_id: str, skip_special_tokens: bool = True
) -> Iterator[TextPiece]:
    """Give a text's pieces as its parts come: of `Decoder.stream`, or a whole `Decoded` in one.

    Args:
        parts: what is new of the prompt, in order; the first begins with the token of the prompt's own pass.
        tokenizer: the target's.
        prompt_id: told in every piece.
        skip_special_tokens: leave out stop tokens and their like, as a reader wants it.
    """
    stream = TextStream(tokenizer, skip_special_tokens=skip_special_tokens)
    first = True
    for part in parts:
        tokens = part.tokens
        if first and tokens:
            first = False
            yield TextPiece(id=prompt_id, text=stream.feed(tokens[:1]), tokens=1, ends_block=True)
            tokens = tokens[1:]
        for committed, accepted in zip(part.committed, part.accepted, strict=True):
            runs = ((tokens[:accepted], True), (tokens[accepted:committed], False))
            tokens = tokens[committed:]
            for ids, drafted in runs:
                if ids:
                    ends = not drafted or accepted == committed
                    yield TextPiece(
                        id=prompt_id, text=stream.feed(ids), tokens=len(ids), drafted=drafted, ends_block=ends
                    )
    yield TextPiece(id=prompt_id, text=stream.finish(), ends_text=True)


def stream_text(decoder: Decoder, tokenizer: Tokenizer, prompt: Sequence[int], **options: Any) -> Iterator[str]:
    """Give the text that follows a prompt while it is decoded; joined it is `tokenizer.decode` of the tokens.

    Args:
        decoder: one for single prompts (`batch_size=1`).
        tokenizer: the target's.
        prompt: token ids.
        options: `drafter`, `sampling`, `blocks_per_step` and the others of `Decoder.stream`.
    """
    parts = (step.rows[0] for step in decoder.stream([prompt], **options))
    for piece in text_pieces(parts, tokenizer, prompt_id=""):
        if piece.text:
            yield piece.text
