"""Prompts as token ids, checked against the target before anything is computed."""

import random
from dataclasses import dataclass

from dflash_jax.core import InputError
from dflash_jax.targets import TargetConfig
from dflash_jax.text import Prompt, Tokenizer, load_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """A prompt and its token ids."""

    prompt: Prompt
    ids: list[int]


def encode_prompts(
    source: str, tokenizer: Tokenizer, config: TargetConfig, *, limit: int | None, seed: int, position_offset: int = 0
) -> list[EncodedPrompt]:
    """Return the first `limit` prompts of a shuffle (all of them, in order, without a limit), tokenised.

    Raises:
        InputError: see `load_prompts`; a prompt that leaves no room in the target's context; an offset too far.
    """
    prompts = load_prompts(source)
    if limit is not None:
        prompts = random.Random(seed).sample(prompts, min(limit, len(prompts)))
    if not 0 <= position_offset <= 2**31 - 1 - config.max_positions:
        raise InputError(
            f"--position-offset is {position_offset}: with a context of {config.max_positions} tokens it must lie in "
            f"0..{2**31 - 1 - config.max_positions}"
        )
    encoded = [EncodedPrompt(prompt=prompt, ids=tokenizer.encode_prompt(prompt)) for prompt in prompts]
    for item in encoded:
        if len(item.ids) >= config.max_positions:
            raise InputError(
                f"prompt {item.prompt.id!r} of {source} has {len(item.ids)} tokens, the target's context is "
                f"{config.max_positions}: shorten it or leave it out"
            )
    return encoded


def by_length(prompts: list[EncodedPrompt], *, batch_size: int) -> list[list[EncodedPrompt]]:
    """Batches of prompts of similar length, longest first: little padding, and the largest shape is compiled first."""
    ordered = sorted(prompts, key=lambda item: -len(item.ids))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
