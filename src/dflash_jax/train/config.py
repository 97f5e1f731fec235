"""What the `train` command is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp

from dflash_jax.core import InputError
from dflash_jax.drafter import Compute
from dflash_jax.train.loss import Denominator, Loss, Objective

Init = Literal["target", "random"]
Dtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "linear", "constant"]


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
    optimizer: Optimizer = "adamw"
    """"adamw", or "muon": matrices by Muon with updates of AdamW's size, norms and biases by AdamW."""
    schedule: Schedule = "cosine"
    """After the warm-up: "cosine" or "linear" to zero, "constant", or "wsd", constant and then linear to zero."""
    learning_rate: float = 6e-4
    """Peak learning rate, of all weights whatever the optimizer."""
    warmup_ratio: float = 0.04
    """Share of the steps spent warming up from zero; the schedule follows."""
    decay_ratio: float = 0.2
    """Share of the steps that the wsd schedule falls in, at its end."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_b2: float = 0.999
    """AdamW's decay of squared gradients; runs of a few hundred steps want 0.95."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    spike_factor: float = 3.0
    """Stop where the loss stays above this times the running median for five steps (of at least 0.5 nats); 0: never."""
    loss: Loss = "cross-entropy"
    """"cross-entropy" against the target's greedy token; "d-pace", the same weighed by how far a block is likely to be
    accepted; "kl" from the target's distribution, of a cache built with --top-k."""
    loss_denominator: Denominator = "weights"
    """What the weighted loss is divided by: the sum of the "weights" (SpecForge) or the number of "labels"
    (speculators)."""
    decay_gamma: float = 4.0
    """Slot k weighs exp(-(k-1)/gamma) in the loss (paper: 4 for 8-slot blocks, 5 for 10, 7 for 16); not with d-pace."""
    dpace_alpha: float = 0.5
    """Smoothing of d-pace's probabilities: 1 makes every slot likely to be reached."""
    dtype: Dtype = "float32"
    """Of activations and products. Weights, their gradients and all sums, norms, softmax and the loss stay float32."""
    remat: bool = False
    """Make a layer's activations again in the backward pass and do not keep them: less memory, about a third more
    work in the drafter's layers."""
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
    init: Init = "target"
    """New weights: "target" copies the target's first and last layers, "random" draws all from N(0, 0.02)."""
    mask_token_id: int | None = None
    """Token whose embedding fills the slots to be drafted; default: an unused special token of the tokenizer."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("steps", "num_layers", "sequences_per_step", "anchors_per_sequence", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}: a positive number is needed")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: a number above 0 is needed")
        if not 0 < self.adam_b2 < 1:
            raise InputError(f"--adam-b2 is {self.adam_b2}: a number between 0 and 1 is needed")
        for name in ("warmup_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: a share from 0 to below 1 is needed"
                )
        for name in ("weight_decay", "spike_factor"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: a number from 0 up is needed")
        self._check_choices()

    def _check_choices(self) -> None:
        if self.block_size is not None and self.block_size < 2:
            raise InputError(
                f"--block-size is {self.block_size}: at least 2 are needed (the anchor and one drafted token)"
            )
        for name, kind in (("init", Init), ("dtype", Dtype), ("optimizer", Optimizer), ("schedule", Schedule)):
            choices = get_args(kind)
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"--{name} is {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")
        _ = self.objective  # which checks its own part

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(
            loss=self.loss, denominator=self.loss_denominator, gamma=self.decay_gamma, alpha=self.dpace_alpha
        )

    @property
    def compute(self) -> Compute:
        """How the drafter is computed."""
        return Compute(dtype=jnp.dtype(self.dtype), remat=self.remat)
