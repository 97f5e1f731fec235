"""z-lab's own DFlash (PyTorch) and transformers' target, run on the folders that we write."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dflash.model
import numpy as np
import torch
import transformers
from dflash.model import DFlashDraftModel, dflash_generate

# Its statistics wait for a CUDA device; on a CPU there is nothing to wait for.
dflash.model._cuda_time = time.perf_counter
transformers.logging.disable_progress_bar()
# With more, its threads spin for cores that XLA or another test worker holds: tiny models took 20 times as long.
torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ZlabRun:
    """What `dflash_generate` did."""

    tokens: list[int]
    committed: list[int]


def load_zlab_drafter(folder: Path) -> DFlashDraftModel:
    """A drafter folder as z-lab's package reads it; every tensor must find its place."""
    loaded: Any = DFlashDraftModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def load_hf_target(folder: Path) -> transformers.LlamaForCausalLM:
    """A target folder as transformers reads it, float32."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def zlab_block(
    model: DFlashDraftModel, slots: np.ndarray, features: np.ndarray, *, position_offset: int = 0
) -> np.ndarray:
    """The drafter's output for one block: `slots` embeddings after the context of `features` rows."""
    positions = torch.arange(len(features) + len(slots))[None] + position_offset
    hidden = model(
        position_ids=positions,
        noise_embedding=torch.from_numpy(np.array(slots))[None],
        target_hidden=torch.from_numpy(np.array(features))[None],
    )
    return hidden[0].numpy()


def zlab_generate(
    model: DFlashDraftModel,
    target: transformers.LlamaForCausalLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    block_size: int | None = None,
) -> ZlabRun:
    """Greedy decoding by z-lab's loop."""
    done = dflash_generate(
        model,
        target,
        torch.LongTensor([list(prompt)]),
        max_new_tokens,
        list(stop_ids),
        block_size=block_size,
        return_stats=True,
    )
    return ZlabRun(tokens=done.output_ids[0, len(prompt) :].tolist(), committed=done.acceptance_lengths)
