"""Draft, verify, commit: greedy and sampled decoding, plain and speculative, and the only accept rule.

It promises: speculative tokens are plain decoding's tokens, sampled ones too; finished rows change nothing for others;
one compiled loop per shape. It imports `core`, `nn`, `drafter` and `targets`.
"""

from dflash_jax.decode.accept import accept_len
from dflash_jax.decode.engine import PROMPT_BUCKET, Decoded, DecodedBatch, Decoder, Streamed
from dflash_jax.decode.explain import Flip, explain_flip
from dflash_jax.decode.loop import (
    DecodeState,
    decode_capacity,
    draft,
    guided_loop,
    plain_loop,
    plain_step,
    speculative_loop,
    speculative_step,
    start_decoding,
    verify,
)
from dflash_jax.decode.sampler import Sampler, Sampling, choose_tokens, token_keys

__all__ = [
    "PROMPT_BUCKET",
    "DecodeState",
    "Decoded",
    "DecodedBatch",
    "Decoder",
    "Flip",
    "Sampler",
    "Sampling",
    "Streamed",
    "accept_len",
    "choose_tokens",
    "decode_capacity",
    "draft",
    "explain_flip",
    "guided_loop",
    "plain_loop",
    "plain_step",
    "speculative_loop",
    "speculative_step",
    "start_decoding",
    "token_keys",
    "verify",
]
