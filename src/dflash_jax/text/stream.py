"""Text from tokens that are still coming, in whole characters."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from dflash_jax.text.tokenizer import Tokenizer


class TextStream:
    """Turns the tokens of one text into text as they come.

    A character that is spread over several tokens comes out whole with the last of them. All that comes out, joined, is
    `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Begin a text; `skip_special_tokens` as in `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._length = 0

    def feed(self, ids: Sequence[int]) -> str:
        """Take the next tokens and return the text that is certain with them, "" where they end inside a character."""
        text = "".join(self._stream.step(self._tokenizer.backend, int(token_id)) or "" for token_id in ids)
        self._ids += map(int, ids)
        self._length += len(text)
        return text

    def finish(self) -> str:
        """Return what is left when no token follows: U+FFFD for a character that was never completed."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)[self._length :]
