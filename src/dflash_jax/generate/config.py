"""What the `responses` and `decode` commands are told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dflash_jax.core import InputError, parse_mesh
from dflash_jax.decode import Sampling
from dflash_jax.nn import check_rope_precision


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"--{name} is {value}: a positive number is needed")


def _at_least_two(block_size: int | None) -> None:
    if block_size is not None and block_size < 2:
        raise InputError(f"--block-size is {block_size}: at least 2 are needed (the anchor and one drafted token)")


def _sampling(config: "ResponsesConfig | DecodeConfig") -> Sampling | None:
    """The sampling that a command's flags ask for; None: greedy.

    Raises:
        InputError: a number out of range, or flags of sampling without a temperature.
    """
    if config.temperature == 0:
        given = [name for name in ("top_k", "top_p") if getattr(config, name) is not None]
        if given:
            flags = " and ".join("--" + name.replace("_", "-") for name in given)
            raise InputError(f"{flags} without --temperature: decoding is greedy at 0, give a positive temperature")
        return None
    return Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.sample_seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponsesConfig:
    """Generate the target's responses to a set of prompts, greedy or sampled."""

    target: Path
    """Target folder."""
    prompts: str
    """A prompts JSONL file, or a built-in set: humaneval, problems, stdlib."""
    out: Path
    """Responses JSONL to write; a partial one is continued."""
    max_new_tokens: int = 128
    """Most tokens generated for a prompt, the stop token included."""
    batch_size: int = 32
    """Prompts decoded side by side."""
    drafter: Path | None = None
    """Decode speculatively with this drafter: the same responses, sooner where it pays."""
    block_size: int | None = None
    """With --drafter: positions per block, at most the trained size; default: the trained size."""
    temperature: float = 0.0
    """Sample at this temperature; 0 is greedy."""
    top_k: int | None = None
    """Sample among so many best tokens only."""
    top_p: float | None = None
    """Sample among the fewest best tokens that have this share of the probability."""
    sample_seed: int = 0
    """Seed of the samples; a prompt's samples depend on it and on the prompt's id."""
    stop_tokens: tuple[str, ...] = ()
    """Texts of one token each that end a response, as the target's own stop ids do."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations. In bfloat16 a response may leave the float32 one at a near tie."""
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
        _sampling(self)
        if self.limit is not None:
            _positive("limit", self.limit)
        if self.block_size is not None and self.drafter is None:
            raise InputError(f"--block-size {self.block_size} without --drafter: plain decoding has no blocks")
        _at_least_two(self.block_size)

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are sampled; None: greedily."""
        return _sampling(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """Decode prompts speculatively with a drafter, greedily or sampled, and compare with plain decoding."""

    target: Path
    """Target folder."""
    drafter: Path
    """Drafter folder (RUN/run-<step>, or any z-lab DFlash checkpoint)."""
    prompts: str
    """A prompts JSONL file, or a built-in set: humaneval, problems, stdlib."""
    max_new_tokens: int = 128
    """Most tokens generated for a prompt, the stop token included."""
    compare: bool = False
    """Run plain decoding too: are the tokens equal, how much faster is it?"""
    block_size: int | None = None
    """Positions per block, at most the trained size; default: the trained size."""
    batch_size: int = 1
    """Prompts decoded side by side."""
    temperature: float = 0.0
    """Sample at this temperature; 0 is greedy."""
    top_k: int | None = None
    """Sample among so many best tokens only."""
    top_p: float | None = None
    """Sample among the fewest best tokens that have this share of the probability."""
    sample_seed: int = 0
    """Seed of the samples; a prompt's samples depend on it and on the prompt's id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of target and drafter. In bfloat16 a near tie may flip a token: --compare explains it."""
    position_offset: int = 0
    """Absolute position of every prompt's first token."""
    mesh: str = "data=1"
    """Devices to split the target over, such as data=2,model=4 (axes: data, expert, model); default: one device. Every
    device holds the whole drafter."""
    rope: str = "exact"
    """How the target's angles are computed: exact, or as other engines do, float32, bfloat16, table:N."""
    limit: int | None = None
    """Use only the first so many prompts (after the shuffle)."""
    seed: int = 0
    """Seed of the prompts' shuffle before --limit."""
    out: Path | None = None
    """Write one JSON line per prompt here: text, tokens, accepted lengths block by block."""
    stream: bool = False
    """Print each text while it is decoded, one prompt at a time."""
    show_blocks: bool = False
    """Print the texts with the drafter's accepted runs marked: green and underlined, without colours in brackets."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        _positive("max-new-tokens", self.max_new_tokens)
        _positive("batch-size", self.batch_size)
        parse_mesh(self.mesh)
        check_rope_precision(self.rope)
        if self.limit is not None:
            _positive("limit", self.limit)
        _at_least_two(self.block_size)
        _sampling(self)
        if self.stream and self.batch_size > 1:
            raise InputError(f"--stream shows one text at a time: leave out --batch-size {self.batch_size}")

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are sampled; None: greedily."""
        return _sampling(self)
