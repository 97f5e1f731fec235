"""The layout of the baseline report's caches: one window of context per sample, joined back into texts.

    meta.json                      ctx_len C, block_size B, hidden_size H, num_context_features K, target_layer_ids,
                                   dtype "bf16_u16"
    context_features_u16.npy       [N, C, K*H]  bits of bfloat16: the C tokens before the anchor
    ctx_token_ids.npy              [N, C]       those tokens
    anchor_ids.npy                 [N]
    anchor_embedding_u16.npy       [N, H]       bits of bfloat16
    target_ids.npy                 [N, B-1]     the target's greedy tokens after the anchor
    ctx_pos_start_i32.npy          [N]          absolute position of the window's first token; MAY be absent: 0
    anchor_pos_i32.npy             [N]          absolute position of the anchor; MAY be absent

A builder that rolls out moves the window on by the 1 to B tokens it commits, so samples of one text lie one after the
other and nearly all of their contexts is the same:

    text     t0 t1 t2 t3 t4 t5 t6 t7 t8 t9 ...
    sample 0 [---- C ----] A  x  x                 B = 3: anchor A at t5, labels x
    sample 1          [---- C ----] A  x  x        moved on by 3

**Source:** radna0/cuda-norm@47feaff, its cache builder (`meta.json`, `np.save`) and `DFlashTeacherCacheDataset`. Its
target_layer_ids are z-lab's, and so ours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int32, Shaped, UInt16

from dflash_jax.cache import Cache, Sequence, hash_prompt
from dflash_jax.core import InputError, read_json, sha256_file

_FEATURES = "context_features_u16"
_OPTIONAL = ("ctx_pos_start_i32", "anchor_pos_i32")
UNKNOWN = -1
"""next_ids of tokens whose greedy successor the source does not have."""
OPEN_TEXTS = 64
"""Texts that a sample may go on with, the last ones begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """A folder of samples, mapped into memory.

    Attributes:
        folder: where it lies.
        meta: meta.json.
        capture_layers: 0-based decoder layers whose outputs the features are.
        context_features: bits of the features before each anchor.
        ctx_token_ids: the tokens before each anchor.
        anchor_ids: each anchor's token.
        anchor_embedding: bits of its embedding.
        target_ids: greedy tokens after it.
        ctx_pos_start: absolute position of each window's first token.
        anchor_pos: absolute position of each anchor.
    """

    folder: Path
    meta: dict[str, Any]
    capture_layers: tuple[int, ...]
    context_features: UInt16[np.ndarray, "sample context features"]
    ctx_token_ids: Int32[np.ndarray, "sample context"]
    anchor_ids: Int32[np.ndarray, " sample"]
    anchor_embedding: UInt16[np.ndarray, "sample hidden"]
    target_ids: Int32[np.ndarray, "sample drafted"]
    ctx_pos_start: Int32[np.ndarray, " sample"]
    anchor_pos: Int32[np.ndarray, " sample"]

    @property
    def block_size(self) -> int:
        """Positions per block, the anchor included."""
        return self.target_ids.shape[1] + 1

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self.ctx_token_ids.shape[1]

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file but the features, which the import compares bit for bit."""
        files = sorted(file for file in self.folder.iterdir() if file.name == "meta.json" or file.suffix == ".npy")
        return {file.name: sha256_file(file) for file in files if file.stem != _FEATURES}


def _meta(folder: Path) -> dict[str, Any]:
    """meta.json with the numbers that this import relies on."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: name the one with meta.json by --source")
    path = folder / "meta.json"
    meta = read_json(path, what="the windows' meta.json")
    if not isinstance(meta, dict):
        raise InputError(f"{path} is not a JSON object")
    for name in ("ctx_len", "block_size", "hidden_size", "num_context_features"):
        if type(meta.get(name)) is not int or meta[name] < 1:
            raise InputError(f"{path}: {name} is {meta.get(name)!r}, a positive number is needed")
    layers = meta.get("target_layer_ids")
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise InputError(f"{path}: target_layer_ids is {layers!r}, a list of layers is needed")
    if len(set(layers)) != meta["num_context_features"] or len(set(layers)) != len(layers):
        raise InputError(f"{path}: target_layer_ids {layers} are not num_context_features different layers")
    if meta.get("dtype", "bf16_u16") != "bf16_u16":
        raise InputError(f"{path}: dtype is {meta['dtype']!r}, only bf16_u16 is known")
    if meta.get("add_one_for_pre_layer_capture", True) is not True:
        raise InputError(f"{path}: add_one_for_pre_layer_capture is off, and what its layer ids then mean is not known")
    return meta


def _load(folder: Path, name: str, shape: tuple[int, ...], dtype: type) -> Shaped[np.ndarray, "..."]:
    """One array, mapped into memory."""
    path = folder / f"{name}.npy"
    if not path.is_file():
        raise InputError(f"the windows' {name} is missing: {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:  # SyntaxError: numpy parses the header as Python
        raise InputError(f"{path} is not a readable .npy file: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise InputError(
            f"{path} is {found}, {np.dtype(dtype)} {list(shape)} is needed, from meta.json and anchor_ids.npy"
        )
    return array


def _samples(folder: Path) -> int:
    """How many samples there are: the length of anchor_ids.npy."""
    path = folder / "anchor_ids.npy"
    try:
        anchors = np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise InputError(f"{path} is not a readable .npy file: {' '.join(str(error).split())}") from error
    if not isinstance(anchors, np.ndarray) or anchors.ndim != 1 or not len(anchors):
        raise InputError(f"{path} is missing, empty or not a list of anchors: the samples cannot be counted")
    return len(anchors)


def open_windows(folder: Path, *, vocab_size: int, hidden_size: int, num_layers: int) -> Windows:
    """Open a folder of samples for a target of these sizes. Features are mapped, not read.

    Raises:
        InputError: something is missing, truncated, of another type or shape; token ids outside the vocabulary; layer
            ids outside the target; positions that contradict one another.
    """
    meta, samples = _meta(folder), _samples(folder)
    context, hidden, layers = meta["ctx_len"], meta["hidden_size"], tuple(meta["target_layer_ids"])
    if hidden != hidden_size:
        raise InputError(f"{folder / 'meta.json'}: hidden_size is {hidden}, the target's is {hidden_size}")
    if min(layers) < 0 or max(layers) >= num_layers:
        raise InputError(
            f"{folder / 'meta.json'}: target_layer_ids {list(layers)} are not all from 0 to {num_layers - 1}"
        )
    shapes = {
        "ctx_token_ids": ((samples, context), np.int32),
        "anchor_ids": ((samples,), np.int32),
        "target_ids": ((samples, meta["block_size"] - 1), np.int32),
        "anchor_embedding_u16": ((samples, hidden), np.uint16),
        _FEATURES: ((samples, context, len(layers) * hidden), np.uint16),
        "ctx_pos_start_i32": ((samples,), np.int32),
        "anchor_pos_i32": ((samples,), np.int32),
    }
    arrays = {
        name: _load(folder, name, shape, dtype)
        for name, (shape, dtype) in shapes.items()
        if name not in _OPTIONAL or (folder / f"{name}.npy").exists()
    }
    for name in ("ctx_token_ids", "anchor_ids", "target_ids"):
        if arrays[name].size and (arrays[name].min() < 0 or arrays[name].max() >= vocab_size):
            raise InputError(f"{folder / name}.npy holds token ids outside the target's vocabulary of {vocab_size}")
    start = arrays.get("ctx_pos_start_i32", np.zeros(samples, np.int32))
    if start.min() < 0 or start.max() > np.iinfo(np.int32).max - context - meta["block_size"]:
        raise InputError(f"{folder / 'ctx_pos_start_i32.npy'} holds positions outside 0 to 2^31")
    anchor_pos = arrays.get("anchor_pos_i32", start + np.int32(context))
    if not np.array_equal(anchor_pos, start + np.int32(context)):
        raise InputError(
            f"{folder / 'anchor_pos_i32.npy'}: an anchor is not {context} positions after its window's start"
        )
    return Windows(
        folder=folder,
        meta=meta,
        capture_layers=layers,
        context_features=arrays[_FEATURES],
        ctx_token_ids=arrays["ctx_token_ids"],
        anchor_ids=arrays["anchor_ids"],
        anchor_embedding=arrays["anchor_embedding_u16"],
        target_ids=arrays["target_ids"],
        ctx_pos_start=np.asarray(start),
        anchor_pos=np.asarray(anchor_pos),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowText:
    """Samples of one text.

    Attributes:
        samples: their numbers in the source, in the text's order.
        anchors: index in the text of each sample's anchor.
        moves: whether `ctx_pos_start` moves on with the window; else every window is said to start at the first's.
    """

    samples: tuple[int, ...]
    anchors: tuple[int, ...]
    moves: bool

    def position(self, sequence: Sequence, anchor: int, context: int) -> int:
        """`ctx_pos_start` of the sample with this anchor."""
        return sequence.position_offset + (anchor - context if self.moves else 0)


def _goes_on(windows: Windows, before: int, sample: int, step: int) -> bool:
    """Whether a sample's window is that of the one before it, moved on by `step` tokens, in every bit."""
    tokens, features, labels = windows.ctx_token_ids, windows.context_features, windows.target_ids
    return bool(
        tokens[sample, -step] == windows.anchor_ids[before]
        and np.array_equal(tokens[sample, :-step], tokens[before, step:])
        # what both samples have labels for
        and np.array_equal(labels[sample, :-step], labels[before, step:])
        # a rollout goes on with the target's token: that after a whole block is in no sample's labels
        and (step == windows.block_size or windows.anchor_ids[sample] == labels[before, step - 1])
        and np.array_equal(features[sample, :-step], features[before, step:])
    )


def _step(windows: Windows, before: int, sample: int) -> int | None:
    """By how many tokens a sample's window lies further on in the text of `before`; None where it is of another."""
    most = min(windows.block_size, windows.context - 1)
    moved = int(windows.ctx_pos_start[sample]) - int(windows.ctx_pos_start[before])
    steps = range(1, most + 1) if moved == 0 else [moved] if 1 <= moved <= most else []
    return next((step for step in steps if _goes_on(windows, before, sample, step)), None)


def find_texts(windows: Windows) -> list[WindowText]:
    """Return the texts that the samples are windows of; reads every feature. A sample is of one text.

    Rollouts may take turns: a sample is tried against the last samples of the `OPEN_TEXTS` texts that were begun last.
    """
    found: list[tuple[list[int], list[int], list[bool]]] = []
    for sample in range(len(windows.anchor_ids)):
        for samples, anchors, moves in reversed(found[-OPEN_TEXTS:]):
            moved = bool(windows.ctx_pos_start[sample] != windows.ctx_pos_start[samples[-1]])
            step = _step(windows, samples[-1], sample) if moves in ([], [moved]) else None
            if step is not None:
                samples.append(sample)
                anchors.append(anchors[-1] + step)
                moves[:] = [moved]
                break
        else:
            found.append(([sample], [windows.context], []))
    return [
        WindowText(samples=tuple(samples), anchors=tuple(anchors), moves=moves != [False])
        for samples, anchors, moves in found
    ]


def text_sequence(windows: Windows, text: WindowText, *, index: int, prompt_set: str) -> Sequence:
    """Return a text as a sequence of a cache: every token once.

    Its last tokens are the last sample's anchor and labels, whose features the source does not have: zeros, behind
    `features_len`.
    """
    context, block = windows.context, windows.block_size
    length = text.anchors[-1] + block
    tokens, next_ids = np.zeros(length, np.int32), np.full(length, UNKNOWN, np.int32)
    features = np.zeros((length, windows.context_features.shape[2]), np.uint16)
    known = 0
    for sample, anchor in zip(text.samples, text.anchors, strict=True):
        new = anchor - known
        tokens[known:anchor] = windows.ctx_token_ids[sample, context - new :]
        features[known:anchor] = windows.context_features[sample, context - new :]
        tokens[anchor] = windows.anchor_ids[sample]
        next_ids[anchor : anchor + block - 1] = windows.target_ids[sample]
        if known and new == block:  # in a rollout the anchor after a whole block is the target's token
            next_ids[anchor - 1] = tokens[anchor]
        known = anchor
    tokens[known + 1 :] = windows.target_ids[text.samples[-1]]
    loss_mask = np.zeros(length, np.uint8)
    loss_mask[context:] = 1
    return Sequence(
        stored_features=features.view(ml_dtypes.bfloat16),
        feature_scales=None,
        token_ids=tokens,
        next_ids=next_ids,
        loss_mask=loss_mask,
        position_offset=int(windows.ctx_pos_start[text.samples[0]]),
        prompt_len=context,
        prompt_hash=hash_prompt(tokens[:context]),
        sequence_index=index,
        prompt_set=prompt_set,
        features_len=known,
    )


def window_arrays(
    sequence: Sequence, text: WindowText, anchor: int, *, context: int, block_size: int
) -> dict[str, np.ndarray]:
    """Return the arrays of one sample, made from a sequence of a cache.

    Args:
        sequence: of the cache.
        text: what the import found.
        anchor: its index in the sequence, at least `context`.
        context: tokens of a window.
        block_size: positions per block, the anchor included.

    Returns:
        The layout's arrays by name, but `anchor_embedding_u16`, which is the target's embedding of `anchor_ids`.
    """
    window = slice(anchor - context, anchor)
    start = text.position(sequence, anchor, context)
    return {
        _FEATURES: np.asarray(sequence.features[window]).view(np.uint16),
        "ctx_token_ids": sequence.token_ids[window],
        "anchor_ids": np.asarray(sequence.token_ids[anchor]),
        "target_ids": sequence.next_ids[anchor : anchor + block_size - 1],
        "ctx_pos_start_i32": np.asarray(start, np.int32),
        "anchor_pos_i32": np.asarray(start + context, np.int32),
    }


def first_difference(cache: Cache, windows: Windows, found: list[WindowText]) -> str | None:
    """Make every sample's arrays from a cache and compare them with the source, bit for bit.

    Returns:
        The first array that differs, and of which sample; None where all are equal.
    """
    source = {
        _FEATURES: windows.context_features,
        "ctx_token_ids": windows.ctx_token_ids,
        "anchor_ids": windows.anchor_ids,
        "target_ids": windows.target_ids,
        "ctx_pos_start_i32": windows.ctx_pos_start,
        "anchor_pos_i32": windows.anchor_pos,
    }
    sizes = {"context": windows.context, "block_size": windows.block_size}
    made_of = np.zeros(len(windows.anchor_ids), np.int64)
    for index, text in enumerate(found):
        sequence = cache.sequence(index)
        for sample, anchor in zip(text.samples, text.anchors, strict=True):
            made_of[sample] += 1
            for name, array in window_arrays(sequence, text, anchor, **sizes).items():
                if not np.array_equal(array, source[name][sample]):
                    return f"{name} of sample {sample}"
    return None if (made_of == 1).all() else "the number of samples"
