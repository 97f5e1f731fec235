"""Text on both ends: prompt sets in, token ids to the models, text back out. May import `core` only.

It promises ids equal to transformers' for the same target folder (fast tokenizers and their chat templates), prompt
sets that are the same on every run, one clear line for every bad row of a prompt file, and never runs code that a
target folder ships.
"""

from dflash_jax.text.encode import EncodedPrompt, encode_prompts
from dflash_jax.text.prompts import BUILT_IN_SETS, Prompt, load_prompts
from dflash_jax.text.stream import TextStream
from dflash_jax.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BUILT_IN_SETS",
    "EncodedPrompt",
    "Prompt",
    "TextStream",
    "Tokenizer",
    "encode_prompts",
    "load_prompts",
    "load_tokenizer",
]
