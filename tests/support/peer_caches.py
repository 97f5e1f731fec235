"""Hidden states as other tools store them, by transformers and torch alone: nothing of ours but the target folder.

`write_windows` is the baseline report's layout (reference: radna0/cuda-norm's builder), `write_speculators` that of
speculators' offline data.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors.torch import save_file

from support.zlab import load_hf_target

datasets.disable_progress_bars()


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """A text through transformers.

    Attributes:
        layers: output of every decoder layer, before the final norm: float32 [layers, T, H].
        greedy: argmax after every token [T].
    """

    layers: torch.Tensor
    greedy: list[int]


@torch.inference_mode()
def trace(model, tokens, *, position_offset=0):
    """Run a text and keep what every layer gives."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in model.model.layers]
    positions = torch.arange(len(tokens))[None] + position_offset
    logits = model(torch.tensor([tokens]), position_ids=positions).logits[0]
    for hook in hooks:
        hook.remove()
    outputs = [out[0] if isinstance(out, tuple) else out for out in outputs]
    return Traced(
        layers=torch.stack([out.reshape(len(tokens), -1) for out in outputs]), greedy=logits.argmax(-1).tolist()
    )


def greedy_text(model, prompt, *, count, position_offset=0):
    """The prompt and `count` greedy tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(trace(model, tokens, position_offset=position_offset).greedy[-1])
    return tokens


def bits(tensor):
    """A float tensor as bfloat16, its bits as numpy's uint16."""
    return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """How the samples of one text are cut: its prompt, where it lies, and by how much each window moves on."""

    prompt: list[int]
    position_offset: int
    steps: tuple[int, ...]


def rollout_samples(model, rollout, *, context, block_size, capture_layers, fresh=False):
    """The samples of one rollout. `fresh` computes every window alone, as the report's builder did."""
    count = sum(rollout.steps) + block_size + 1
    text = greedy_text(model, rollout.prompt, count=count, position_offset=rollout.position_offset)
    whole = trace(model, text, position_offset=rollout.position_offset)
    start, samples = 0, []
    for step in (*rollout.steps, 0):
        anchor = start + context
        window = text[start:anchor]
        position = rollout.position_offset + (0 if fresh else start)
        layers = trace(model, window, position_offset=position).layers if fresh else whole.layers[:, start:anchor]
        labels = text[anchor + 1 : anchor + block_size]
        if not fresh:
            assert labels == whole.greedy[anchor : anchor + block_size - 1]
        samples.append(
            {
                "context_features_u16": np.concatenate([bits(layers[k]) for k in capture_layers], axis=1),
                "anchor_embedding_u16": bits(model.model.embed_tokens.weight[text[anchor]]),
                "target_ids": np.array(labels, np.int32),
                "ctx_token_ids": np.array(window, np.int32),
                "anchor_ids": np.int32(text[anchor]),
                "ctx_pos_start_i32": np.int32(position),
                "anchor_pos_i32": np.int32(position + context),
            }
        )
        start += step
    return samples


def write_windows(folder: Path, target: Path, rollouts, *, context, block_size, capture_layers, turns=False, **options):
    """A folder of samples; with `turns` the rollouts take turns, sample by sample. Returns the arrays."""
    model = load_hf_target(target)
    sizes = {"context": context, "block_size": block_size, "capture_layers": capture_layers}
    by_rollout = [rollout_samples(model, rollout, **sizes, **options) for rollout in rollouts]
    if turns:
        samples = [part[i] for i in range(max(map(len, by_rollout))) for part in by_rollout if i < len(part)]
    else:
        samples = [sample for part in by_rollout for sample in part]
    arrays = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    meta = {
        "ctx_len": context,
        "ctx_len_full": context + 1,
        "block_size": block_size,
        "num_samples": len(samples),
        "target_layer_ids": list(capture_layers),
        "add_one_for_pre_layer_capture": True,
        "hidden_size": model.config.hidden_size,
        "num_context_features": len(capture_layers),
        "dtype": "bf16_u16",
        "position_offsets": sorted({rollout.position_offset for rollout in rollouts}),
    }
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return arrays


def write_speculators(folder: Path, target: Path, rows, *, aux_layers, dtype=torch.bfloat16, leave_out=()):
    """A data folder with hidden states of `rows` (token ids, loss mask); `aux_layers` are speculators' ids.

    Returns what was traced of each row.
    """
    model = load_hf_target(target)
    data = {
        "input_ids": [ids for ids, _ in rows],
        "loss_mask": [mask for _, mask in rows],
        "seq_len": [len(ids) for ids, _ in rows],
    }
    dataset = datasets.Dataset.from_dict(data)
    dataset.set_format("torch")
    dataset.save_to_disk(folder, num_shards=min(2, len(rows)))
    (folder / "hidden_states").mkdir()
    traced = []
    for index, (ids, _) in enumerate(rows):
        one = trace(model, ids)
        traced.append(one)
        if index in leave_out:
            continue
        # id k is what layer k reads, the output of layer k - 1; the last slot is the last layer's, before the norm
        slots = [one.layers[k - 1] for k in aux_layers] + [one.layers[-1]]
        hidden = torch.stack(slots, dim=1).to(dtype)
        save_file(
            {"token_ids": torch.tensor(ids), "hidden_states": hidden},
            folder / "hidden_states" / f"hs_{index}.safetensors",
        )
    return traced
