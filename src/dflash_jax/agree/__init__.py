"""Does decoding do, block by block, what the offline replay says? And where it does not, what is to blame?

It promises: the replay is the check's and decoding is `decode`'s, neither a copy; causes are found by exchanging one
thing at a time. It imports `accept`, `cache`, `decode`, `drafter`, `targets`, `text`, `nn` and `core`.
"""

from dflash_jax.agree.config import AgreeConfig
from dflash_jax.agree.run import agree

__all__ = ["AgreeConfig", "agree"]
