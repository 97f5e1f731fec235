"""Whether a drafter can work with a target at all: sizes and block size, before anything is loaded."""

from pathlib import Path

from dflash_jax.core import InputError
from dflash_jax.drafter import DrafterConfig
from dflash_jax.targets import TargetConfig


def check_fit(drafter: DrafterConfig, target: TargetConfig, *, where: Path) -> None:
    """Raise where a drafter cannot work with a target.

    Args:
        drafter: the drafter's sizes.
        target: the target's.
        where: the drafter's folder, for the message.

    Raises:
        InputError: every size that differs, by name.
    """
    pairs = {
        "hidden_size": (drafter.hidden_size, target.hidden_size),
        "vocab_size": (drafter.vocab_size, target.vocab_size),
        "num_target_layers": (drafter.num_target_layers, target.num_layers),
    }
    wrong = [f"{name} is {ours}, the target's is {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if wrong:
        raise InputError(f"the drafter {where} does not fit the target: {'; '.join(wrong)}")


def check_block_size(asked: int | None, config: DrafterConfig) -> int:
    """Return the block size to use: the one asked for, or the trained one.

    Raises:
        InputError: more was asked for than the drafter was trained for.
    """
    if asked is not None and asked > config.block_size:
        raise InputError(
            f"--block-size is {asked}: the drafter was trained for blocks of {config.block_size}, at most that"
        )
    return asked or config.block_size
