"""Draft, verify, commit: greedy decoding, plain and speculative, and the only accept rule.

It promises: speculative tokens are plain decoding's tokens; finished rows change nothing for others; one compiled loop
per shape. It imports `core`, `nn`, `drafter` and `targets`.
"""

from dflash_jax.decode.accept import accept_len
from dflash_jax.decode.engine import Decoded, DecodedBatch, Decoder
from dflash_jax.decode.loop import (
    DecodeState,
    decode_capacity,
    draft,
    plain_step,
    speculative_loop,
    speculative_step,
    start_decoding,
    verify,
)

__all__ = [
    "DecodeState",
    "Decoded",
    "DecodedBatch",
    "Decoder",
    "accept_len",
    "decode_capacity",
    "draft",
    "plain_step",
    "speculative_loop",
    "speculative_step",
    "start_decoding",
    "verify",
]
