"""A prompt set as token ids."""

import random
from dataclasses import dataclass

from dflash_jax.core import InputError
from dflash_jax.text.prompts import Prompt, load_prompts
from dflash_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt and its token ids."""

    prompt: Prompt
    ids: list[int]


def encode_prompts(
    source: str, tokenizer: Tokenizer, *, max_positions: int, limit: int | None, seed: int
) -> list[EncodedPrompt]:
    """Return the first `limit` prompts of a shuffle (all of them, in order, without a limit), tokenised.

    Args:
        source: see `load_prompts`.
        tokenizer: the target's.
        max_positions: the target's context, tokens.
        limit: most prompts; None: all.
        seed: of the shuffle before the limit.

    Raises:
        InputError: see `load_prompts`; a prompt that leaves no room in the target's context.
    """
    prompts = load_prompts(source)
    if limit is not None:
        prompts = random.Random(seed).sample(prompts, min(limit, len(prompts)))
    encoded = [EncodedPrompt(prompt=prompt, ids=tokenizer.encode_prompt(prompt)) for prompt in prompts]
    for item in encoded:
        if len(item.ids) >= max_positions:
            raise InputError(
                f"prompt {item.prompt.id!r} of {source} has {len(item.ids)} tokens, the target's context is "
                f"{max_positions}: shorten it or leave it out"
            )
    return encoded
