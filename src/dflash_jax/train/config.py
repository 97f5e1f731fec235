"""What the `train` command is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp

from dflash_jax.core import InputError, parse_device, parse_mesh
from dflash_jax.drafter import Compute
from dflash_jax.train.loss import Denominator, Loss, Objective
from dflash_jax.train.offsets import parse_offsets
from dflash_jax.train.track import TrackerName

Init = Literal["target", "random"]
Dtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "wsd", "linear", "constant"]


DEFAULT_TOP_K = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a DFlash drafter on a feature cache, or on features that the target computes in every step."""

    target: Path
    """Target folder; for --plan with --device, one with a config.json alone will do."""
    out: Path
    """Run folder to write; it must be new unless --resume is given."""
    features: Literal["cached", "live"] = "cached"
    """Where features come from: read from --cache, or computed by the target from --responses in every step."""
    cache: Path | None = None
    """Feature cache to train on."""
    responses: Path | None = None
    """Responses JSONL to train on with --features live."""
    capture_layers: tuple[int, ...] | None = None
    """With --features live: see `cache build`."""
    position_offsets: str = "0"
    """With --features live: position of a sequence's first token, a list such as 0,4096 (every sequence at each) or
    random:MAX (drawn anew for every sequence and epoch, 0 to MAX)."""
    steps: int = 2000
    """Optimizer steps in all (the schedule ends there)."""
    block_size: int | None = None
    """Positions per block, the anchor included; default 8, or that of --init-from."""
    num_layers: int | None = None
    """Drafter layers; default 4, or those of --init-from."""
    sliding_window: int | None = None
    """New drafters: slots look back so many tokens in sliding layers, which are causal within a block. Default: to the
    text's beginning."""
    full_layers: tuple[int, ...] | None = None
    """With --sliding-window: layers that do not slide, such as 4; default: all slide."""
    sequences_per_step: int = 4
    """Sequences per optimizer step."""
    anchors_per_sequence: int = 64
    """Anchors drawn from each sequence, anew every step."""
    accumulate: int | None = None
    """Take a step's sequences in so many parts, one after the other, and add up their gradients: activations need so
    much less memory, the step is the same. Default: all at once."""
    length_buckets: int | None = None
    """Pad batches to so many widths, not all to the longest sequence: sequences of similar length share a step, and
    every width is compiled once. Worth it where lengths differ and steps are many. Default: one width."""
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
    accepted; "kl" from the target's distribution, of a cache built with --top-k or live."""
    top_k: int | None = None
    """With --features live and --loss kl: likeliest tokens of the target that a slot learns from; default 32."""
    loss_denominator: Denominator = "weights"
    """What the weighted loss is divided by: the sum of the "weights" (SpecForge) or the number of "labels"
    (speculators)."""
    decay_gamma: float = 4.0
    """Slot k weighs exp(-(k-1)/gamma) in the loss (paper: 4 for 8-slot blocks, 5 for 10, 7 for 16); not with d-pace."""
    dpace_alpha: float = 0.5
    """Smoothing of d-pace's probabilities: 1 makes every slot likely to be reached."""
    sampled_vocab: int | None = None
    """Estimate the loss's softmax from so many tokens, drawn anew every step: all labels of the step and an even sample
    of the others. 8192 of 49152 make the head's part of a step a sixth. Default: all."""
    dtype: Dtype = "float32"
    """Of activations and products. Weights, their gradients and all sums, norms, softmax and the loss stay float32."""
    remat: bool = False
    """Make a layer's activations again in the backward pass and do not keep them: less memory, about a third more
    work in the drafter's layers."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always kept."""
    keep: int | None = None
    """Newest drafters that stay, besides RUN/best, run-0 and those of the two newest states; default: all."""
    eval_cache: Path | None = None
    """Cache of held-out prompts; RUN/best is the drafter with the highest replay tau on those not trained on."""
    eval_every: int | None = None
    """Steps between evaluations (each is a checkpoint too); default: --checkpoint-every. The last step is evaluated."""
    mesh: str = "data=1"
    """Devices to train on, such as data=2,model=4: sequences are split over data, head and blocks over model."""
    keep_initial: bool = False
    """Write run-0 too, the drafter before training: what any check should beat."""
    seed: int = 0
    """Seed of the initial weights, the data order and the anchors."""
    resume: bool = False
    """Go on from --out's latest state, bit for bit; --init-from, if the run had one, need not be repeated."""
    init_from: Path | None = None
    """Start from this drafter's weights instead of new ones (fine-tuning); a draft vocabulary is left behind."""
    init: Init = "target"
    """New weights: "target" copies the target's first and last layers, "random" draws all from N(0, 0.02)."""
    mask_token_id: int | None = None
    """Token whose embedding fills the slots to be drafted; default: an unused special token of the tokenizer."""
    tensorboard: bool = False
    """Write the curve as TensorBoard event files too, into RUN/tensorboard."""
    track: TrackerName = "none"
    """Send the curve to wandb or trackio too, where that package is installed."""
    plan: bool = False
    """Say what the run will take (memory, FLOPs, traffic, time) and do not start it."""
    device: str | None = None
    """With --plan: estimate for this device from its data sheet (h100, h200, v6e-8, v5p-64), not by trying this one."""
    utilisation: float = 0.4
    """With --plan and --device: share of the data sheet's FLOP/s that the products are taken to reach."""
    length: int | None = None
    """With --plan: tokens of a sequence, where there is no --cache and no --responses yet."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in (
            "steps",
            "num_layers",
            "sequences_per_step",
            "anchors_per_sequence",
            "accumulate",
            "length_buckets",
            "checkpoint_every",
            "keep",
            "eval_every",
            "length",
            "top_k",
            "sliding_window",
        ):
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
        self._check_run()

    def _check_choices(self) -> None:
        if self.sequences_per_step % self.parts:
            raise InputError(
                f"--accumulate is {self.accumulate}, --sequences-per-step {self.sequences_per_step}: make it a multiple"
            )
        if self.full_layers is not None and self.sliding_window is None:
            raise InputError("--full-layers names layers that do not slide: give --sliding-window with it")
        if self.sliding_window is not None and self.init_from is not None:
            raise InputError("--sliding-window is for new drafters: one of --init-from slides as it did")
        if self.block_size is not None and self.block_size < 2:
            raise InputError(
                f"--block-size is {self.block_size}: at least 2 are needed (the anchor and one drafted token)"
            )
        for name, kind in (
            ("init", Init),
            ("dtype", Dtype),
            ("optimizer", Optimizer),
            ("schedule", Schedule),
            ("track", TrackerName),
        ):
            choices = get_args(kind)
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"--{name} is {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")
        _ = self.objective  # which checks its own part

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(
            loss=self.loss,
            denominator=self.loss_denominator,
            gamma=self.decay_gamma,
            alpha=self.dpace_alpha,
            sampled_vocab=self.sampled_vocab,
        )

    @property
    def parts(self) -> int:
        """Parts that a step's sequences are taken in."""
        return self.accumulate or 1

    @property
    def live_top_k(self) -> int:
        """Likeliest tokens that live sequences have; 0 where the loss asks for none."""
        return (self.top_k or DEFAULT_TOP_K) if self.loss == "kl" else 0

    @property
    def compute(self) -> Compute:
        """How the drafter is computed."""
        return Compute(dtype=jnp.dtype(self.dtype), remat=self.remat)

    def _check_run(self) -> None:
        """Check where sequences come from, where they go, and what drafters are measured on."""
        parse_mesh(self.mesh)
        if self.eval_every is not None and self.eval_cache is None:
            raise InputError(f"--eval-every is {self.eval_every}: there is no --eval-cache to evaluate on")
        if self.features not in ("cached", "live"):
            raise InputError(f"--features is {self.features!r}: choose cached or live")
        is_live = self.features == "live"
        needed, other = ("responses", "cache") if is_live else ("cache", "responses")
        is_imagined = self.plan and self.length is not None
        if (getattr(self, needed) is None and not is_imagined) or getattr(self, other) is not None:
            raise InputError(f"--features {self.features} needs --{needed}, and no --{other}")
        if not is_live and not is_imagined and (self.capture_layers is not None or self.position_offsets != "0"):
            raise InputError("--capture-layers and --position-offsets are the cache's: give them with --features live")
        if self.top_k is not None and not (is_live and self.loss == "kl"):
            raise InputError("--top-k is the cache's, and of --loss kl alone: give it with --features live --loss kl")
        parse_offsets(self.position_offsets)
        if not self.plan and (self.device is not None or self.length is not None):
            raise InputError("--device and --length only tell --plan what to count: give them with it")
        if not 0 < self.utilisation <= 1:
            raise InputError(f"--utilisation is {self.utilisation}: more than 0 and at most 1 is needed")
        if self.device is not None:
            parse_device(self.device)

    def is_checkpoint(self, step: int) -> bool:
        """Whether the state after `step` steps is kept."""
        return step % self.checkpoint_every == 0 or step == self.steps or self.is_evaluated(step)

    def is_evaluated(self, step: int) -> bool:
        """Whether the drafter after `step` steps is measured on held-out prompts."""
        every = self.eval_every or self.checkpoint_every
        return self.eval_cache is not None and (step % every == 0 or step == self.steps)
