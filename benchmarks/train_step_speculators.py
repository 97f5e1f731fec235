"""The training step of speculators itself, for `train_step.py`: PyTorch alone, so that its process holds no JAX.

    .venv-dev/bin/python benchmarks/train_step_speculators.py WORLD --sequences 4

makes three steps of a world that `train_step.py` wrote and prints the process's peak.
"""

import argparse
import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dflash_jax.core import give_back_freed


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchWorld:
    """What both train on, as speculators is given it.

    Attributes:
        sizes: options of `train_step.py`, and `capture_layers`, `mask_id` and `gamma`.
        weights: the drafter's first ones, by their public names.
        head: the target's embedding and head, tied.
        features: of every sequence.
        last_hidden: the target's last hidden states after its norm.
        token_ids: the sequences.
    """

    sizes: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]
    head: np.ndarray
    features: np.ndarray
    last_hidden: np.ndarray
    token_ids: np.ndarray

    def save(self, folder: Path) -> None:
        """Write it to an empty folder."""
        folder.joinpath("sizes.json").write_text(json.dumps(self.sizes))
        np.savez(folder / "weights.npz", allow_pickle=False, **self.weights)
        for name in ("head", "features", "last_hidden", "token_ids"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "TorchWorld":
        """Read what `save` wrote."""
        with np.load(folder / "weights.npz") as stored:
            weights = {name: stored[name] for name in stored}
        arrays = {name: np.load(folder / f"{name}.npy") for name in ("head", "features", "last_hidden", "token_ids")}
        return cls(sizes=json.loads(folder.joinpath("sizes.json").read_text()), weights=weights, **arrays)


class Speculators:
    """speculators' DFlash model in its own training step: forward, backward, clip, AdamW."""

    def __init__(self, world: TorchWorld, *, sequences: int) -> None:
        from speculators.losses import resolve_loss_config
        from speculators.models.dflash import core

        torch.set_num_threads(world.sizes["threads"])
        self._core: Any = core
        self._model = _model(world)
        self._trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=6e-4, betas=(0.9, 0.999), weight_decay=0.0)
        self._forward = torch.compile(self._model.forward)
        self._settings = {
            "loss_config": resolve_loss_config("ce", "eager"),
            "gamma": world.sizes["gamma"],
            "max_anchors": world.sizes["anchors"],
            "per_position_loss_weight": "fixed-exp-decay",
        }
        self._rows = [_row(world, index) for index in range(sequences)]

    def loss(self, row: Mapping[str, Any]) -> Any:
        """The loss of one sequence."""
        return self._forward(**row, **self._settings)[1]

    def loss_at(self, anchors: np.ndarray) -> float:
        """The loss of the first sequence at given anchors, by the model's own forward."""
        drawn = self._core.select_anchors
        chosen = torch.from_numpy(anchors.astype(np.int64))
        self._core.select_anchors = lambda *_: (chosen, torch.ones(len(anchors), dtype=torch.bool))
        try:
            with torch.no_grad():
                return float(self._model.forward(**self._rows[0], **self._settings)[1])
        finally:
            self._core.select_anchors = drawn

    def __call__(self) -> float:
        """One step over all its sequences in turn; returns the last one's loss."""
        loss = None
        for row in self._rows:
            loss = self.loss(row)
            (loss / len(self._rows)).backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        assert loss is not None
        return float(loss.detach())


def _row(world: TorchWorld, index: int) -> dict[str, Any]:
    """One sequence as speculators' collator gives it: a row of one document."""
    tokens = world.token_ids.shape[1]
    return {
        "hidden_states": torch.from_numpy(world.features[index : index + 1].copy()),
        "input_ids": torch.from_numpy(world.token_ids[index : index + 1].astype(np.int64)),
        "loss_mask": torch.ones(1, tokens, dtype=torch.long),
        "verifier_last_hidden_states": torch.from_numpy(world.last_hidden[index : index + 1].copy()),
        "document_ids": torch.zeros(1, tokens, dtype=torch.long),
    }


def _model(world: TorchWorld) -> Any:
    """Their model with our weights. Its target's norm is left out: the last hidden states come normed."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    sizes = world.sizes
    layers = Qwen3Config(
        vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"], rms_norm_eps=1e-5, max_position_embeddings=8192, attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=False,
    )  # fmt: skip
    layers._attn_implementation = "sdpa"
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layers,
        draft_vocab_size=sizes["vocab"],
        block_size=sizes["block_size"],
        aux_hidden_state_layer_ids=[layer + 1 for layer in sizes["capture_layers"]],
        mask_token_id=sizes["mask_id"],
        speculators_config=SpeculatorsConfig(
            algorithm="dflash",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=sizes["block_size"] - 1)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )
    model = DFlashDraftModel(config).to(torch.float32)
    ours = {name: torch.from_numpy(np.array(value)) for name, value in world.weights.items()}
    head = torch.from_numpy(np.array(world.head))
    ends = dict.fromkeys(("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight"), head)
    missing, unexpected = model.load_state_dict(ours | ends, strict=False)
    assert not unexpected, f"speculators' model has no {unexpected}"
    assert set(missing) <= {"verifier_norm.weight"}, f"speculators' model wants {missing} too"
    # a frozen head is one tensor in its trainer as well: the three are tied here, which is to its advantage
    model.lm_head.weight = model.verifier_lm_head.weight = model.embed_tokens.weight
    model.verifier_norm = torch.nn.Identity()
    return model.train()


def main() -> None:
    """Three steps, then this process's peak. What only the beginning needed is given back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, help="folder that TorchWorld.save wrote")
    parser.add_argument("--sequences", type=int, default=1)
    options = parser.parse_args()
    step = Speculators(TorchWorld.load(options.world), sequences=options.sequences)
    for _ in range(3):
        give_back_freed()
        step()
    assert "jax" not in sys.modules, "this process is to hold PyTorch alone"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    sys.stdout.write(json.dumps({"memory": {"host_bytes": peak, "device_bytes": None}}) + "\n")


if __name__ == "__main__":
    main()
