"""Prompt files in, text out: the drivers of the `responses` and `decode` commands.

It promises: an interrupted `responses` run goes on where it stopped; a comparison times both ways side by side. It
imports `core`, `text`, `targets`, `drafter` and `decode`.
"""

from dflash_jax.generate.config import DecodeConfig, ResponsesConfig
from dflash_jax.generate.decode import decode_prompts
from dflash_jax.generate.responses import generate_responses
from dflash_jax.generate.stream import TextPiece, stream_text, text_pieces

__all__ = [
    "DecodeConfig",
    "ResponsesConfig",
    "TextPiece",
    "decode_prompts",
    "generate_responses",
    "stream_text",
    "text_pieces",
]
