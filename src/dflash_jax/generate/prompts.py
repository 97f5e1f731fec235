"""Prompts as token ids, checked against the target before anything is computed."""

import hashlib

from dflash_jax.core import InputError
from dflash_jax.targets import TargetConfig
from dflash_jax.text import EncodedPrompt, Tokenizer
from dflash_jax.text import encode_prompts as encode


def encode_prompts(
    source: str, tokenizer: Tokenizer, config: TargetConfig, *, limit: int | None, seed: int, position_offset: int = 0
) -> list[EncodedPrompt]:
    """Return the first `limit` prompts of a shuffle (all of them, in order, without a limit), tokenised.

    Raises:
        InputError: see `text.encode_prompts`; an offset too far.
    """
    if not 0 <= position_offset <= 2**31 - 1 - config.max_positions:
        raise InputError(
            f"--position-offset is {position_offset}: with a context of {config.max_positions} tokens it must lie in "
            f"0..{2**31 - 1 - config.max_positions}"
        )
    return encode(source, tokenizer, max_positions=config.max_positions, limit=limit, seed=seed)


def by_length(prompts: list[EncodedPrompt], *, batch_size: int) -> list[list[EncodedPrompt]]:
    """Batches of prompts of similar length, longest first: little padding, and the largest shape is compiled first."""
    ordered = sorted(prompts, key=lambda item: -len(item.ids))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def sample_stream(prompt_id: str) -> int:
    """Return the stream of a prompt's samples, of its id alone: its text is the same whatever runs beside it."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:4], "little") >> 1
