"""What the `check` command is told."""

from dataclasses import dataclass
from pathlib import Path

from dflash_jax.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """Offline accept check: how long a prefix of each drafted block the target would accept."""

    target: Path
    """Target folder."""
    cache: Path
    """Feature cache to check on."""
    drafter: Path
    """Drafter folder (RUN/run-<step>, or any z-lab DFlash checkpoint)."""
    block_size: int | None = None
    """Positions per block, at most the trained size; default: the trained size."""
    position_offsets: tuple[int, ...] | None = None
    """Check only sequences stored at these offsets; default: all."""
    anchors_per_chunk: int = 32
    """Anchors drafted in one forward; bounds memory."""
    bootstrap_samples: int = 2000
    """Resamples of prompts behind each interval."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.block_size is not None and self.block_size < 2:
            raise InputError(
                f"--block-size is {self.block_size}: at least 2 are needed (the anchor and one drafted token)"
            )
        if self.anchors_per_chunk < 1 or self.bootstrap_samples < 1:
            raise InputError("--anchors-per-chunk and --bootstrap-samples need positive numbers")
