"""The offline accept check: what decoding would accept, measured on stored responses.

It promises: blocks are drafted exactly as decoding drafts them and judged by decoding's accept rule; seen and unseen
prompts are told apart; intervals are over prompts. It imports `cache`, `decode`, `drafter`, `targets`, `text`, `nn`
and `core`.
"""

from dflash_jax.check.config import CheckConfig
from dflash_jax.check.run import check

__all__ = ["CheckConfig", "check"]
