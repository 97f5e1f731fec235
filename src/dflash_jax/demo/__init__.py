"""The whole chain on the embedded default target: every stage through the function its command calls.

It imports every room below it.
"""

from dflash_jax.demo.config import DemoConfig
from dflash_jax.demo.run import run_demo

__all__ = ["DemoConfig", "run_demo"]
