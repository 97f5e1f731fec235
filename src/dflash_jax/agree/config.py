"""What the `agree` command is told."""

from dataclasses import dataclass
from pathlib import Path

from dflash_jax.core import InputError, parse_mesh
from dflash_jax.nn import check_rope_precision


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreeConfig:
    """Decode a cache's prompts and compare with the offline replay, block by block; exit 1 where they differ.

    Each prompt is decoded at its own position offset, with the cache's token budget. A cache of float32 features
    (`cache build --features float32`) agrees in every block; one of bfloat16 or 8 bits may flip near ties, which are
    listed with the cause `features`.
    """

    target: Path
    """Target folder."""
    cache: Path
    """Feature cache of the target's greedy responses."""
    drafter: Path
    """Drafter folder (RUN/run-<step>, or any z-lab DFlash checkpoint)."""
    served_drafter: Path | None = None
    """The drafter that decodes, where it is not --drafter: an export of it, or another revision."""
    rope: str = "exact"
    """How decoding's target computes its angles: exact, or as other engines do, float32, bfloat16, table:N."""
    block_size: int | None = None
    """Positions per block, at most the trained size; default: the trained size."""
    position_offsets: tuple[int, ...] | None = None
    """Compare only sequences stored at these offsets; default: all."""
    limit: int | None = None
    """Use only the first so many texts (rows of the responses file), at every offset."""
    batch_size: int = 8
    """Prompts decoded side by side."""
    mesh: str = "data=1"
    """Devices to split the target over, such as data=2,model=4 (axes: data, expert, model); default: one device. Every
    device holds the whole drafter, embedding and head."""
    anchors_per_chunk: int = 64
    """Anchors that the replay drafts in one turn; bounds memory."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("limit", "batch_size", "anchors_per_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: a positive number is needed")
        if self.block_size is not None and self.block_size < 2:
            raise InputError(
                f"--block-size is {self.block_size}: at least 2 are needed (the anchor and one drafted token)"
            )
        check_rope_precision(self.rope)
        parse_mesh(self.mesh)
