"""What the `cache build` command is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dflash_jax.cache.features import FEATURES_DTYPES, FeatureLayout, FeaturesDtype
from dflash_jax.core import InputError, parse_mesh
from dflash_jax.nn import check_rope_precision

MAX_TOP_K = 1024  # 6 KiB a token, more than the features of most targets
ComputeDtype = Literal["float32", "bfloat16"]
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
    features: FeaturesDtype = "bfloat16"
    """How a feature is stored; int8 and float8 have scales per token and take about half of bfloat16's bytes."""
    top_k: int = 0
    """Likeliest tokens of the target stored after each token, with their log-probabilities, for `train --loss kl`."""
    dtype: ComputeDtype = "float32"
    """What the target runs in; bfloat16 halves its memory, and on an NVIDIA GPU its attention is cuDNN's."""
    mesh: str = "data=1"
    """Devices to split the target over, such as data=2,model=4 (axes: data, expert, model); default: one device."""
    rope: str = "exact"
    """How the target's angles are computed: exact, or as other engines do, float32, bfloat16, table:N."""
    tokens_per_batch: int = 4096
    """Most tokens in one forward, padding included (one sequence may be longer); bounds device memory."""
    tokens_per_shard: int = 65536
    """Most tokens in one shard file (one batch may be larger); bounds host memory to about three shards."""
    share_prompts: bool = True
    """Whether responses to one prompt compute and store it once."""
    process_index: int | None = None
    """Which of --process-count builders of this cache this is, from 0; default: what jax.distributed says."""
    process_count: int | None = None
    """How many processes build this cache together, each its own shards, to the bytes of one."""

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
        for name, choices in (("features", FEATURES_DTYPES), ("dtype", get_args(ComputeDtype))):
            if getattr(self, name) not in choices:
                raise InputError(f"--{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise InputError(f"--top-k is {self.top_k}: a number from 0 to {MAX_TOP_K} is needed")
        index, count = self.process_index, self.process_count
        if (index is None) != (count is None) or (count is not None and not 0 <= (index or 0) < count):
            raise InputError(
                f"--process-index is {index}, --process-count is {count}: give both, the index from 0 to the count - 1"
            )
        parse_mesh(self.mesh)
        check_rope_precision(self.rope)
        for name in ("tokens_per_batch", "tokens_per_shard"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: a positive number is needed")

    def feature_layout(self, hidden_size: int) -> FeatureLayout:
        """Return how features are stored; the capture layers must be resolved."""
        assert self.capture_layers is not None
        return FeatureLayout(
            num_layers=len(self.capture_layers), hidden_size=hidden_size, dtype=self.features, top_k=self.top_k
        )


def _commas(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
