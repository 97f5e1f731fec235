"""The `responses` command: responses of the target, greedy or sampled, in batches that are refilled, resumable."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dflash_jax.accept import check_block_size, check_fit
from dflash_jax.core import (
    InputError,
    Move,
    atomic_file,
    make_record,
    mesh_shape,
    no_progress,
    require_one_process,
    sha256_json,
    write_json,
)
from dflash_jax.decode import PROMPT_BUCKET, Decoded, Decoder
from dflash_jax.drafter import drafter_fingerprint, load_drafter, read_drafter_config
from dflash_jax.generate.config import ResponsesConfig
from dflash_jax.generate.prompts import EncodedPrompt, encode_prompts, sample_stream
from dflash_jax.targets import (
    TargetConfig,
    fingerprint,
    load_target,
    open_mesh,
    put_whole,
    read_target_config,
    whole_axes,
)
from dflash_jax.text import Tokenizer, load_tokenizer


def _partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _read_partial(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an interrupted run by prompt id. What a kill left of a last line is cut off the file.

    Raises:
        InputError: the file was begun with other settings, or is damaged.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    # Bytes and not text: a kill may cut a character, and a response may hold characters that str.splitlines cuts at.
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it to start afresh") from error
    if not rows:
        return {}
    changed = [f"{k} was {rows[0].get(k)!r}, now {v!r}" for k, v in settings.items() if rows[0].get(k) != v]
    if changed:
        raise InputError(f"{path} was begun with other settings ({'; '.join(changed)}): remove it or keep the settings")
    os.truncate(path, len(whole))
    return {row["id"]: row for row in rows[1:]}


def _row(item: EncodedPrompt, outcome: Decoded, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "id": item.prompt.id,
        "set": item.prompt.set,
        "prompt_ids": item.ids,
        "response_ids": outcome.tokens,
        "finish": "stop" if outcome.stopped else "length",
        "text": tokenizer.decode(outcome.tokens),
    }


def _queues(prompts: list[EncodedPrompt], *, batch_size: int) -> list[list[EncodedPrompt]]:
    """Prompts of similar length together, longest first; a queue of fewer than a batch takes shorter ones too.

    A queue pads all its prompts alike, and its last texts run with ever fewer beside them: so few of them, each even.
    """
    queues: list[list[EncodedPrompt]] = []
    for item in sorted(prompts, key=lambda item: -len(item.ids)):
        alike = queues and -(-len(item.ids) // PROMPT_BUCKET) == -(-len(queues[-1][0].ids) // PROMPT_BUCKET)
        if alike or (queues and len(queues[-1]) < batch_size):
            queues[-1].append(item)
        else:
            queues.append([item])
    return queues


def _ids_of(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The ids of texts that are one token each.

    Raises:
        InputError: a text of another number of tokens.
    """
    ids = []
    for text in texts:
        tokens = tokenizer.encode(text)
        if len(tokens) != 1:
            raise InputError(
                f"--stop-tokens has {text!r}, which is {len(tokens)} of the target's tokens: give single ones"
            )
        ids += tokens
    return ids


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append whole lines and sync: after a kill, all but the last line can be trusted."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def _check_drafter(config: ResponsesConfig, target: TargetConfig) -> str | None:
    """The fingerprint of the drafter, where there is one; it is looked at before the work.

    Raises:
        InputError: it does not go with the target, or not with blocks of this size.
    """
    if config.drafter is None:
        return None
    drafter_config = read_drafter_config(config.drafter)
    check_fit(drafter_config, target, where=config.drafter)
    check_block_size(config.block_size, drafter_config)
    return drafter_fingerprint(config.drafter)


def _settings(
    config: ResponsesConfig, prompts: Sequence[EncodedPrompt], *, target_sha256: str, drafter_sha256: str | None
) -> dict[str, Any]:
    """What a partial file is bound to."""
    exact = config.dtype == "float32"
    return {
        "target": target_sha256,
        "prompts": sha256_json([[item.prompt.id, item.ids] for item in prompts]),
        "max_new_tokens": config.max_new_tokens,
        "rope": config.rope,
        # None, as in files begun before there was sampling, is greedy
        "sampling": None if config.sampling is None else asdict(config.sampling),
        # as are float32, and no stop ids but the target's
        "dtype": None if exact else config.dtype,
        "stop_tokens": list(config.stop_tokens) or None,
        # in 16 bits a near tie may go another way in a block
        "drafter_sha256": None if exact else drafter_sha256,
        "block_size": None if exact else config.block_size,
    }


def generate_responses(config: ResponsesConfig, *, progress: Move = no_progress) -> dict[str, Any]:
    """Write the target's response to every prompt, greedy or sampled, in the prompts' order, and a record beside them.

    Finished texts are kept in `OUT.partial`, so the same command goes on where a killed one stopped. In float32 a
    drafter is none of the settings that a file is bound to: it changes no token.

    Returns:
        `responses`, `num_prompts`, `num_tokens` (new ones, this run's), `tokens_per_s`, `seconds`, `finish` counts,
        `mesh`, `whole_axes` (what the mesh cannot split, and why), `sampling` (None: greedy), `tau_micro` (tokens
        committed per target pass of this run, pooled over blocks; None without a drafter).

    Raises:
        InputError: bad target, prompts, stop tokens or mesh; a drafter that does not fit, a block size that it was not
            trained for; an output that exists; a partial file begun with other settings.
    """
    if config.out.exists():
        raise InputError(f"{config.out} exists already: choose another --out or remove it")
    started = time.perf_counter()
    require_one_process("responses")
    target_config = read_target_config(config.target)
    drafter_sha256 = _check_drafter(config, target_config)
    mesh = open_mesh(target_config, config.mesh)
    tokenizer = load_tokenizer(config.target)
    prompts = encode_prompts(config.prompts, tokenizer, target_config, limit=config.limit, seed=config.seed)
    stop_ids = (*tokenizer.stop_ids, *_ids_of(config.stop_tokens, tokenizer))
    target_fingerprint = fingerprint(config.target) | tokenizer.fingerprint()
    settings = _settings(config, prompts, target_sha256=sha256_json(target_fingerprint), drafter_sha256=drafter_sha256)
    partial = _partial_path(config.out)
    done = _read_partial(partial, settings)
    # before the partial file: a damaged target leaves none behind
    dtype = jnp.dtype(config.dtype)
    target = load_target(config.target, rope=config.rope, dtype=dtype, mesh=mesh)
    drafter = None if config.drafter is None else put_whole(mesh, load_drafter(config.drafter, dtype=dtype))
    if not done:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        _append(partial, [settings])
    todo = [item for item in prompts if item.prompt.id not in done]
    decoder = Decoder(
        target,
        stop_ids=stop_ids,
        max_new_tokens=config.max_new_tokens,
        batch_size=min(config.batch_size, max(1, len(todo))),
    )
    num_tokens, committed = 0, list[int]()
    how: dict[str, Any] = {"sampling": config.sampling, "drafter": drafter, "block_size": config.block_size}
    for queue in _queues(todo, batch_size=config.batch_size):
        streams = [sample_stream(item.prompt.id) for item in queue]
        for ended in decoder.queue([item.ids for item in queue], streams=streams, **how):
            committed += [tokens for _, outcome in ended for tokens in outcome.committed]
            rows = [_row(queue[place], outcome, tokenizer) for place, outcome in ended]
            _append(partial, rows)
            done |= {row["id"]: row for row in rows}
            num_tokens += sum(len(row["response_ids"]) for row in rows)
            progress(len(done), len(prompts), f"{num_tokens / (time.perf_counter() - started):.0f} tokens/s")
    record = make_record(
        "responses",
        config,
        seed=config.seed,
        fingerprint=target_fingerprint,
        sampling=settings["sampling"],
        drafter_sha256=drafter_sha256,
    )
    write_json(config.out.with_name(config.out.name + ".record.json"), record)
    with atomic_file(config.out) as temporary:
        lines = [json.dumps(done[item.prompt.id], ensure_ascii=False) + "\n" for item in prompts]
        temporary.write_text("".join(lines), encoding="utf-8")
    partial.unlink()
    seconds = time.perf_counter() - started
    return {
        "responses": str(config.out),
        "num_prompts": len(prompts),
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
        "seconds": seconds,
        "finish": {
            kind: sum(done[item.prompt.id]["finish"] == kind for item in prompts) for kind in ("stop", "length")
        },
        "mesh": str(mesh_shape(mesh)),
        "whole_axes": whole_axes(target_config, mesh_shape(mesh)),
        "sampling": settings["sampling"],
        "tau_micro": sum(committed) / len(committed) if committed and drafter is not None else None,
    }
