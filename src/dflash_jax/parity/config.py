"""What the `parity` command is told: which texts, at which offsets, served by an engine that does what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dflash_jax.core import InputError, parse_mesh
from dflash_jax.nn import MAX_POSITION, check_rope_precision

DEFAULT_OFFSETS = (0, 4096, 65536, 131072, 1048576)
POSITIONS = ("absolute", "ignore-offset", "context-ignores-offset", "block-ignores-offset")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig:
    """Does a drafter accept as much at any absolute position? And if not, what is to blame?

    The same texts are read at every offset by the engine that the settings describe, and compared anchor by anchor with
    a reference: exact angles, features computed here, positions where they belong, at the smallest offset.
    """

    target: Path
    """Target folder."""
    drafter: Path
    """Drafter folder (RUN/run-<step>, or any z-lab DFlash checkpoint)."""
    prompts: str | None = None
    """A prompts JSONL file, or a built-in set: humaneval, problems, stdlib; greedy responses to them come first."""
    responses: Path | None = None
    """Responses JSONL, as `dflash-jax responses` writes it, in place of --prompts."""
    cache: Path | None = None
    """Take the engine's features and labels from this cache, whoever made it; texts and offsets are the cache's."""
    position_offsets: tuple[int, ...] | None = None
    """Absolute positions of a text's first token; default: 0,4096,65536,131072,1048576, or all of --cache."""
    limit: int | None = None
    """Use only the first so many texts (prompts: after the shuffle)."""
    max_new_tokens: int = 128
    """Most tokens generated for a prompt, the stop token included."""
    rope: str = "exact"
    """How the engine computes the target's angles: exact, float32, bfloat16, table:N."""
    drafter_rope: str = "exact"
    """How the engine computes the drafter's angles: exact, float32, bfloat16, table:N."""
    drafter_positions: Literal["absolute", "ignore-offset", "context-ignores-offset", "block-ignores-offset"] = (
        "absolute"
    )
    """Whether the engine's drafter knows of the offset: for everything, nothing, or for one of context and block."""
    context_shift: int = 0
    """The engine places the drafter's context rows so many positions after where they belong."""
    block_shift: int = 0
    """The engine places the drafter's block slots so many positions after where they belong."""
    block_size: int | None = None
    """Positions per block, at most the trained size; default: the trained size."""
    margin: float = 0.1
    """Accepted tokens per block by which two chains may differ and still count as equal."""
    mesh: str = "data=1"
    """Devices to split the target over, such as data=2,model=4 (axes: data, expert, model); default: one device. Every
    device holds the whole drafter, embedding and head."""
    tokens_per_batch: int = 2048
    """Most tokens in one forward of the target, padding included (one text may be longer); bounds memory."""
    anchors_per_chunk: int = 32
    """Anchors drafted in one forward; bounds memory."""
    bootstrap_samples: int = 2000
    """Resamples of prompts behind each interval."""
    seed: int = 0
    """Seed of the prompts' shuffle and of the bootstrap."""

    def __post_init__(self) -> None:
        """Check what can be checked without the target."""
        sources = [name for name in ("prompts", "responses", "cache") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise InputError("parity needs texts from one place: give one of --prompts, --responses and --cache")
        self._check_numbers()
        check_rope_precision(self.rope)
        check_rope_precision(self.drafter_rope)
        parse_mesh(self.mesh)
        if self.drafter_positions not in POSITIONS:
            raise InputError(f"--drafter-positions is {self.drafter_positions!r}: choose {', '.join(POSITIONS)}")
        if self.cache is not None and self.rope != "exact":
            raise InputError("--rope describes an engine whose features are computed here: leave it out with --cache")

    def _check_numbers(self) -> None:
        offsets = self.position_offsets
        if offsets is not None and (
            not offsets or min(offsets) < 0 or max(offsets) > MAX_POSITION or len(set(offsets)) != len(offsets)
        ):
            raise InputError(
                f"--position-offsets is {','.join(map(str, offsets))!r}: name different positions from 0 to "
                f"{MAX_POSITION}"
            )
        for name in ("limit", "max_new_tokens", "tokens_per_batch", "anchors_per_chunk", "bootstrap_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: a positive number is needed")
        if self.block_size is not None and self.block_size < 2:
            raise InputError(
                f"--block-size is {self.block_size}: at least 2 are needed (the anchor and one drafted token)"
            )
        if not self.margin > 0:
            raise InputError(f"--margin is {self.margin}: a number of accepted tokens above 0 is needed")

    def starts(self, offset: int) -> tuple[int, int]:
        """Return where the engine puts the drafter's context row 0, and index 0 as its block slots count, at an offset.

        Worked: offset 4096, `block-ignores-offset`, block_shift 1: (4096, 1).
        """
        context = 0 if self.drafter_positions in ("ignore-offset", "context-ignores-offset") else offset
        block = 0 if self.drafter_positions in ("ignore-offset", "block-ignores-offset") else offset
        return context + self.context_shift, block + self.block_shift
