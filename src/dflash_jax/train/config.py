"""What the `train` command is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dflash_jax.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a DFlash drafter on a feature cache."""

    target: Path
    """Target folder."""
    cache: Path
    """Feature cache to train on."""
    out: Path
    """Run folder to write; it must be new unless --resume is given."""
    steps: int = 2000
    """Optimizer steps in all (the schedule ends there)."""
    block_size: int | None = None
    """Positions per block, the anchor included; default 8, or that of --init-from."""
    num_layers: int | None = None
    """Drafter layers; default 4, or those of --init-from."""
    sequences_per_step: int = 4
    """Sequences per optimizer step."""
    anchors_per_sequence: int = 64
    """Anchors drawn from each sequence, anew every step."""
    learning_rate: float = 6e-4
    """Peak learning rate of AdamW."""
    warmup_ratio: float = 0.04
    """Share of the steps spent warming up; a cosine to zero follows."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    adam_b2: float = 0.999
    """AdamW's decay of squared gradients; runs of a few hundred steps want 0.95."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    decay_gamma: float = 4.0
    """Slot k weighs exp(-(k-1)/gamma) in the loss (paper: 4 for 8-slot blocks, 5 for 10, 7 for 16)."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always kept."""
    keep_initial: bool = False
    """Write run-0 too, the drafter before training: what any check should beat."""
    seed: int = 0
    """Seed of the initial weights, the data order and the anchors."""
    resume: bool = False
    """Go on from --out's latest state, bit for bit; --init-from, if the run had one, need not be repeated."""
    init_from: Path | None = None
    """Start from this drafter's weights instead of new ones (fine-tuning)."""
    init: Literal["target", "random"] = "target"
    """New weights: "target" copies the target's first and last layers, "random" draws all from N(0, 0.02)."""
    mask_token_id: int | None = None
    """Token whose embedding fills the slots to be drafted; default: an unused special token of the tokenizer."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("steps", "num_layers", "sequences_per_step", "anchors_per_sequence", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: a positive number is needed")
        for name in ("learning_rate", "clip_norm", "decay_gamma"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: a number above 0 is needed")
        if not 0 < self.adam_b2 < 1:
            raise InputError(f"--adam-b2 is {self.adam_b2}: a number between 0 and 1 is needed")
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"--warmup-ratio is {self.warmup_ratio}: a share from 0 to below 1 is needed")
        if not self.weight_decay >= 0:
            raise InputError(f"--weight-decay is {self.weight_decay}: a number from 0 up is needed")
        if self.block_size is not None and self.block_size < 2:
            raise InputError(
                f"--block-size is {self.block_size}: at least 2 are needed (the anchor and one drafted token)"
            )
        if self.init not in ("target", "random"):
            raise InputError(f"--init is {self.init!r}: choose target or random")
