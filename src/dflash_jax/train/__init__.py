"""A feature cache to a drafter: loss, step, loop, checkpoints.

It promises: a step depends on its number, the seed and the state alone, so a resumed run equals an uninterrupted one
bit for bit; nothing of rows x vocabulary is made; a checkpoint is whole or absent. It imports `cache`, `drafter`,
`targets`, `text`, `nn` and `core`.
"""

from dflash_jax.train.config import TrainConfig
from dflash_jax.train.memory import StepBytes, step_bytes
from dflash_jax.train.run import train

__all__ = ["StepBytes", "TrainConfig", "step_bytes", "train"]
