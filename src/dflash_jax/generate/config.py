"""What the `responses` and `decode` commands are told."""

from dataclasses import dataclass
from pathlib import Path

from dflash_jax.core import InputError, parse_mesh
from dflash_jax.nn import check_rope_precision


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"--{name} is {value}: a positive number is needed")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponsesConfig:
    """Generate the target's greedy responses to a set of prompts."""

    target: Path
    """Target folder."""
    prompts: str
    """A prompts JSONL file, or a built-in set: humaneval, stdlib."""
    out: Path
    """Responses JSONL to write; a partial one is continued."""
    max_new_tokens: int = 128
    """Most tokens generated for a prompt, the stop token included."""
    batch_size: int = 32
    """Prompts decoded side by side."""
    mesh: str = "data=1"
    """Devices to split the target over, such as data=2,model=4 (axes: data, expert, model); default: one device."""
    rope: str = "exact"
    """How the target's angles are computed: exact, or as other engines do, float32, bfloat16, table:N."""
    limit: int | None = None
    """Use only the first so many prompts (after the shuffle)."""
    seed: int = 0
    """Seed of the prompts' shuffle before --limit."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        _positive("max-new-tokens", self.max_new_tokens)
        _positive("batch-size", self.batch_size)
        parse_mesh(self.mesh)
        check_rope_precision(self.rope)
        if self.limit is not None:
            _positive("limit", self.limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """Decode prompts speculatively with a drafter, and compare with plain decoding."""

    target: Path
    """Target folder."""
    drafter: Path
    """Drafter folder (RUN/run-<step>, or any z-lab DFlash checkpoint)."""
    prompts: str
    """A prompts JSONL file, or a built-in set: humaneval, stdlib."""
    max_new_tokens: int = 128
    """Most tokens generated for a prompt, the stop token included."""
    compare: bool = False
    """Run plain decoding too: are the tokens equal, how much faster is it?"""
    block_size: int | None = None
    """Positions per block, at most the trained size; default: the trained size."""
    batch_size: int = 1
    """Prompts decoded side by side."""
    position_offset: int = 0
    """Absolute position of every prompt's first token."""
    rope: str = "exact"
    """How the target's angles are computed: exact, or as other engines do, float32, bfloat16, table:N."""
    limit: int | None = None
    """Use only the first so many prompts (after the shuffle)."""
    seed: int = 0
    """Seed of the prompts' shuffle before --limit."""
    out: Path | None = None
    """Write one JSON line per prompt here: text, tokens, accepted lengths block by block."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        _positive("max-new-tokens", self.max_new_tokens)
        _positive("batch-size", self.batch_size)
        check_rope_precision(self.rope)
        if self.limit is not None:
            _positive("limit", self.limit)
        if self.block_size is not None and self.block_size < 2:
            raise InputError(
                f"--block-size is {self.block_size}: at least 2 are needed (the anchor and one drafted token)"
            )
