"""What the commands `cache import|export` and `import|export` are told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dflash_jax.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheImportConfig:
    """Make a feature cache of another tool's hidden states."""

    format: Literal["speculators", "windows"]
    """speculators: its offline hidden states; windows: one context per sample (meta.json, context_features_u16.npy)."""
    source: Path
    """Folder to import: speculators' data folder (state.json, data-*.arrow), or the one with meta.json."""
    target: Path
    """Target folder that the hidden states were made with."""
    out: Path
    """Cache folder to write; it must be new."""
    hidden_states: Path | None = None
    """speculators only: folder of hs_0.safetensors and so on; default: hidden_states in the source."""
    aux_layers: tuple[int, ...] | None = None
    """speculators only: its aux_hidden_state_layer_ids, in order (id k is the input of layer k, our layer k - 1)."""
    prompt_set: str = "imported"
    """Name of the prompt set that all sequences are said to be from."""
    tokens_per_shard: int = 65536
    """Most tokens in one shard file (one text may be larger)."""
    check_tokens: int = 64
    """Tokens of the first text whose features are compared with the target's; 0 compares none."""

    def __post_init__(self) -> None:
        """Check what can be checked without the source."""
        if (self.format == "speculators") != (self.aux_layers is not None):
            raise InputError(
                "--aux-layers names speculators' layers: it is needed for --format speculators and for no other"
            )
        if self.format != "speculators" and self.hidden_states is not None:
            raise InputError("--hidden-states is for --format speculators only: leave it out")
        if self.aux_layers is not None and (not self.aux_layers or len(set(self.aux_layers)) != len(self.aux_layers)):
            raise InputError(f"--aux-layers is {','.join(map(str, self.aux_layers))!r}: name different layers")
        if self.tokens_per_shard < 1:
            raise InputError(f"--tokens-per-shard is {self.tokens_per_shard}: a positive number is needed")
        if self.check_tokens < 0:
            raise InputError(f"--check-tokens is {self.check_tokens}: 0 or more is needed")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheExportConfig:
    """Write a feature cache as another tool's hidden states."""

    cache: Path
    """Cache folder."""
    target: Path
    """Target folder of the cache; it computes the last layer where the cache lacks it."""
    out: Path
    """Folder to write; it must be new."""
    format: Literal["speculators"] = "speculators"
    """speculators: a dataset of tokens and hidden_states/hs_0.safetensors and so on."""
    position_offset: int = 0
    """Sequences stored at this offset are exported; any but 0 are written as if they began at 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterExportConfig:
    """Write a drafter as serving engines load it, and say what they are to be started with."""

    drafter: Path
    """Drafter folder (RUN/run-<step>, RUN/best, or any z-lab DFlash checkpoint)."""
    out: Path
    """Folder to write; it must be new."""
    format: Literal["z-lab", "speculators"] = "z-lab"
    """z-lab: read by vLLM, SGLang and TPU servers; speculators: read by vLLM, and trained on by speculators."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights that are written."""
    target: Path | None = None
    """Target folder; its sizes are compared with the drafter's. speculators needs it: its config names the target."""
    verifier: str | None = None
    """speculators only: what its config calls the target, such as a Hugging Face id; default: --target."""
    draft_vocab: int | None = None
    """Draft from so many tokens, those most frequent among the labels of --cache's responses: a draft then meets a part
    of the target's head. 4096 of 49152 make a draft of SmolLM2 half as long. Default: all, or what the drafter
    has. The trained weights stay as they are; `check --compare-drafters` says what it costs."""
    cache: Path | None = None
    """With --draft-vocab: the cache whose labels are counted; use the one trained on, not the one checked on."""

    def __post_init__(self) -> None:
        """Check what can be checked without the drafter."""
        if self.format == "speculators" and self.target is None:
            raise InputError("--format speculators names the target in its config: give --target")
        if self.format != "speculators" and self.verifier is not None:
            raise InputError("--verifier is for --format speculators only: leave it out")
        if self.draft_vocab is not None and self.draft_vocab < 1:
            raise InputError(f"--draft-vocab is {self.draft_vocab}: a positive number is needed")
        if (self.draft_vocab is None) != (self.cache is None):
            raise InputError("--draft-vocab counts the labels of a cache: give --draft-vocab and --cache together")


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterImportConfig:
    """Make a drafter folder of another trainer's checkpoint: z-lab's layout or speculators', found by its config."""

    drafter: Path
    """Folder to import: config.json and model.safetensors."""
    out: Path
    """Drafter folder to write; it must be new."""
    target: Path | None = None
    """Target folder; its sizes are compared with the drafter's. A checkpoint of speculators needs it."""
