"""Positional parity: does a drafter accept as much at any absolute position, and if not, what is to blame?

It promises: every comparison is on the same anchors of the same texts; every chain runs through decoding's own drafter
forward, label rule and accept rule; causes are named by looking at features, outputs and positions, never by reading
settings back. It imports `accept`, `cache`, `decode`, `drafter`, `targets`, `text`, `nn` and `core`.
"""

from dflash_jax.parity.config import ParityConfig
from dflash_jax.parity.run import parity

__all__ = ["ParityConfig", "parity"]
