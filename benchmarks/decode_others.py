"""Other people's decoding on the same weights: transformers' `generate`, and z-lab's `dflash_generate`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def use_torch(threads: int) -> Any:
    """Return torch with so many threads, transformers quiet."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch


def load_hf_target(folder: Path) -> Any:
    """A target folder as transformers reads it, float32, that never stops by itself."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """transformers' greedy `generate` of batches of prompts, left-padded as it wants them.

    Attributes:
        model: the target.
        batches: prompts, some at a time.
        compiled: static cache and torch.compile, its fastest form where a kernel launch or a Python step costs; else
            its default.
        width: tokens that prompts are padded to, one shape to compile; None pads a batch to its longest.
    """

    model: Any
    batches: Sequence[Sequence[Sequence[int]]]
    compiled: bool
    width: int | None

    def __call__(self, new_tokens: int) -> list[list[int]]:
        """Every prompt's new tokens."""
        import torch
        import transformers

        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        if self.compiled:
            # on a CPU `generate` compiles only where it is told so; cudagraphs, its default mode, are a GPU's
            compile_config = transformers.CompileConfig(mode="default", dynamic=False)
            compile_config._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
            options |= {"cache_implementation": "static", "compile_config": compile_config}
        found = []
        for prompts in self.batches:
            width = self.width or max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            with torch.inference_mode():
                done = self.model.generate(ids, attention_mask=mask, **options)
            found += done[:, width:].tolist()
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ZlabRun:
    """What `dflash_generate` did to one prompt: new tokens, tokens committed by each block, seconds per new token."""

    tokens: list[int]
    committed: list[int]
    decode_s: float


class Zlab:
    """z-lab's loop with a drafter folder."""

    def __init__(self, drafter: Path, target: Any) -> None:
        """Load the drafter as z-lab's package reads it; every tensor must find its place."""
        import dflash.model
        import torch

        # its statistics wait for a CUDA device; on a CPU there is nothing to wait for
        dflash.model._cuda_time = time.perf_counter
        loaded: Any = dflash.model.DFlashDraftModel.from_pretrained(
            drafter, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        assert not any(info.values()), info
        self._model, self._target = model.eval(), target

    def __call__(self, prompt: Sequence[int], *, new_tokens: int, stop_ids: Sequence[int] | None) -> ZlabRun:
        """Decode one prompt greedily."""
        import torch
        from dflash.model import dflash_generate

        ids: Any = torch.tensor([list(prompt)])
        stops = None if stop_ids is None else list(stop_ids)
        done: Any = dflash_generate(self._model, self._target, ids, new_tokens, stops, return_stats=True)
        tokens = done.output_ids[0, len(prompt) :].tolist()
        return ZlabRun(
            tokens=tokens, committed=done.acceptance_lengths, decode_s=done.time_per_output_token * len(tokens)
        )
