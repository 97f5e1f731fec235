"""What the `cache build` command is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dflash_jax.core import InputError, parse_mesh
from dflash_jax.nn import check_rope_precision

MAX_POSITION = 2**31 - 1  # positions are int32 on disk and on the device


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBuildConfig:
    """Run the target over responses and store its features, every token once."""

    target: Path
    """Target folder."""
    responses: Path
    """Responses JSONL, as `dflash-jax responses` writes it."""
    out: Path
    """Cache folder to write; a partial one made with the same settings is continued."""
    capture_layers: tuple[int, ...] | None = None
    """0-based decoder layers whose outputs are stored, in this order; default: 4, evenly spaced."""
    position_offsets: tuple[int, ...] = (0,)
    """Absolute positions of a sequence's first token; every sequence is captured at each of them."""
    features: Literal["bfloat16", "float32"] = "bfloat16"
    """How a feature is stored."""
    mesh: str = "data=1"
    """Devices to split the target over, such as data=2,model=4 (axes: data, expert, model); default: one device."""
    rope: str = "exact"
    """How the target's angles are computed: exact, or as other engines do, float32, bfloat16, table:N."""
    tokens_per_batch: int = 4096
    """Most tokens in one forward, padding included (one sequence may be longer); bounds device memory."""
    tokens_per_shard: int = 65536
    """Most tokens in one shard file (one batch may be larger); bounds host memory to about three shards."""

    def __post_init__(self) -> None:
        """Check what can be checked without the target."""
        layers, offsets = self.capture_layers, self.position_offsets
        if layers is not None and (not layers or min(layers) < 0 or len(set(layers)) != len(layers)):
            raise InputError(
                f"--capture-layers is {_commas(layers)!r}: name different layers from 0 up, such as 1,10,18,27"
            )
        if not offsets or min(offsets) < 0 or max(offsets) > MAX_POSITION or len(set(offsets)) != len(offsets):
            raise InputError(
                f"--position-offsets is {_commas(offsets)!r}: name different positions from 0 to {MAX_POSITION}"
            )
        if self.features not in ("bfloat16", "float32"):
            raise InputError(f"--features is {self.features!r}: choose bfloat16 or float32")
        parse_mesh(self.mesh)
        check_rope_precision(self.rope)
        for name in ("tokens_per_batch", "tokens_per_shard"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: a positive number is needed")


def _commas(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
