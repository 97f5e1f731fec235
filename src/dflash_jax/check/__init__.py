"""The offline accept check: what decoding would accept, measured on stored responses.

It promises: blocks are drafted exactly as decoding drafts them and judged by decoding's accept rule (`accept`); seen
and unseen prompts are told apart; intervals are over prompts; what must be known before the numbers are believed is a
warning. It imports `accept`, `cache`, `drafter`, `targets`, `text` and `core`.
"""

from dflash_jax.check.config import CheckConfig
from dflash_jax.check.run import check

__all__ = ["CheckConfig", "check"]
