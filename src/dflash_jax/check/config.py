"""What the `check` command is told."""

from dataclasses import dataclass
from pathlib import Path

from dflash_jax.accept import parse_anchors
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
    anchors: str = "all"
    """Where blocks are drafted in each response: all, every:N (every N-th token) or random:N (N tokens, by --seed)."""
    compare_drafters: tuple[Path, ...] = ()
    """Further drafters: each is checked too, and compared with every other on the same cache."""
    compare_caches: tuple[Path, ...] = ()
    """Further caches: each drafter is checked on them too, and each cache compared with every other."""
    block_size: int | None = None
    """Positions per block, at most the trained size; default: the trained size."""
    position_offsets: tuple[int, ...] | None = None
    """Check only sequences stored at these offsets; default: all."""
    anchors_per_chunk: int = 64
    """Anchors drafted in one turn; bounds memory."""
    bootstrap_samples: int = 2000
    """Resamples of prompts behind each interval."""
    seed: int = 0
    """Seed of the bootstrap and of --anchors random:N."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        parse_anchors(self.anchors)
        if self.block_size is not None and self.block_size < 2:
            raise InputError(
                f"--block-size is {self.block_size}: at least 2 are needed (the anchor and one drafted token)"
            )
        if self.anchors_per_chunk < 1 or self.bootstrap_samples < 1:
            raise InputError("--anchors-per-chunk and --bootstrap-samples need positive numbers")
        for flag, paths in (
            ("--compare-drafters", (self.drafter, *self.compare_drafters)),
            ("--compare-caches", (self.cache, *self.compare_caches)),
        ):
            twice = [path for path in paths if paths.count(path) > 1]
            if twice:
                raise InputError(f"{flag}: {twice[0]} is named twice: name each of the others once")
